"""Plans of the five real sizes, from headers alone, against tables and figures of others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import family
import pytest
import torch
from family import FP4, INT4, MEMBERS, Layout
from transformers import AutoConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForConditionalGeneration
from transformers.models.gemma4_unified.modeling_gemma4_unified import (
    Gemma4UnifiedForConditionalGeneration,
)

from cabochon.config import parse_config
from cabochon.engine.cache import PAGE, cache_groups
from cabochon.load.report import Report, inspect_checkpoint

UNMATCHED = "this rule of quantization_config matches nothing; the file decides"

# Matrices, counted by hand: text (attention, MLP, ...), vision, sound.
SITES = {
    "E2B": (15 * 4 + 20 * 2) + 3 * 35 + 2 * 35 + 3 + (16 * 7 + 2) + (12 * 11 + 3),
    "E4B": (24 * 4 + 18 * 2) + 3 * 42 + 2 * 42 + 3 + (16 * 7 + 2) + (12 * 11 + 3),
    "12B": (40 * 4 + 8 * 3) + 3 * 48 + 1 + 2 + 1,
    "26B-A4B": (25 * 4 + 5 * 3) + 3 * 30 + 3 * 30 + 1 + (27 * 7 + 2),
    "31B": (50 * 4 + 10 * 3) + 3 * 60 + 1 + (27 * 7 + 2),
}


def plan(folder: Path, member: str, tensors: Layout, **described: object) -> Report:
    return inspect_checkpoint(
        family.write_headers(folder, tensors, family.config(member) | described)
    )


@pytest.mark.parametrize("member", MEMBERS)
def test_the_tables_are_upstreams_model(member: str, tmp_path: Path) -> None:
    """Written by hand from the released layouts, they name what transformers builds."""
    (tmp_path / "config.json").write_text(json.dumps(family.config(member)))
    unified = member == "12B"
    cls = Gemma4UnifiedForConditionalGeneration if unified else Gemma4ForConditionalGeneration
    with torch.device("meta"):
        state = cls(AutoConfig.from_pretrained(tmp_path)).state_dict()
    state.pop("lm_head.weight")
    expected = {spelling_on_disk(name): tuple(tensor.shape) for name, tensor in state.items()}
    assert {name: shape for name, (_, shape) in family.layout(member).items()} == expected


def spelling_on_disk(name: str) -> str:
    """transformers renames the encoder-free embedder on loading."""
    name = name.replace("embed_vision.multimodal_embedder.", "embed_vision.")
    for part in ("patch_", "pos_"):
        name = name.replace(f"model.embed_vision.{part}", f"model.vision_embedder.{part}")
    return name


@pytest.mark.parametrize("member", MEMBERS)
def test_every_tensor_of_the_real_sizes_is_read(member: str, tmp_path: Path) -> None:
    tensors = family.layout(member)
    report = plan(tmp_path, member, tensors)
    assert report.loads, report.text()
    assert report.plan is not None
    assert len(report.plan.sites) == SITES[member]
    assert len(report.plan.sites) + len(report.plan.parameters) == len(tensors)
    assert report.nbytes == family.nbytes(tensors)


@pytest.mark.parametrize("member", MEMBERS)
def test_both_schemas_of_the_configuration_are_one_model(member: str) -> None:
    newer = parse_config(family.config(member, per_layer=True))
    assert newer == parse_config(family.config(member))


# (layers, window, heads, head size) of each kind, from the released configurations
KEPT = {
    "E2B": {("sliding", 12, 512, 1, 256), ("full", 3, None, 1, 512)},
    "E4B": {("sliding", 20, 512, 2, 256), ("full", 4, None, 2, 512)},
    "12B": {("sliding", 40, 1024, 8, 256), ("full", 8, None, 1, 512)},
    "26B-A4B": {("sliding", 25, 1024, 8, 256), ("full", 5, None, 2, 512)},
    "31B": {("sliding", 50, 1024, 16, 256), ("full", 10, None, 4, 512)},
}


@pytest.mark.parametrize("member", MEMBERS)
def test_keys_and_values(member: str, tmp_path: Path) -> None:
    report = plan(tmp_path, member, family.layout(member))
    rows = report.as_dict()["kv_cache"]
    found = {
        tuple(row[k] for k in ("kind", "layers", "window", "kv_heads", "head_dim")) for row in rows
    }
    assert found == KEPT[member]
    for row in rows:
        elements = 2 * row["layers"] * row["kv_heads"] * row["head_dim"]
        scales = 4 * elements // row["head_dim"]  # of int8, one of float32 for each head
        wanted = {"bf16": 2 * elements, "f32": 4 * elements, "int8": elements + scales}
        assert row["bytes_per_token"] == wanted
        if row["window"] is None:
            assert row["most_bytes_per_sequence"] is None
        else:
            assert row["most_bytes_per_sequence"]["bf16"] == row["window"] * 2 * elements
    assert report.plan is not None
    pages = cache_groups(report.plan.config.text)
    held = [group.page_bytes(torch.bfloat16) for group in pages]
    assert held == [PAGE * row["bytes_per_token"]["bf16"] for row in rows]


def test_flashinfer_3327_31b_needs_225280_bytes_a_token_on_each_of_four(tmp_path: Path) -> None:
    rows = plan(tmp_path, "31B", family.layout("31B")).as_dict()["kv_cache"]
    assert sum(row["bytes_per_token"]["bf16"] for row in rows) == 4 * 225_280
    # and the terminal says so: 50 x 2 x 16 x 256 x 2 bytes, 10 x 2 x 4 x 512 x 2 bytes
    text = inspect_checkpoint(tmp_path).text()
    assert "819.20 kB" in text
    assert "81.92 kB" in text


def test_e2b_has_15_layers_of_its_own_keys(tmp_path: Path) -> None:
    """tpu-inference #3225: layers 15 to 34 share them. Google's first release stores both."""
    tensors = family.layout("E2B")
    own = [name for name in tensors if name.endswith("k_proj.weight") and "language" in name]
    assert len(own) == 15
    redundant = dict(tensors)
    for index in range(15, 35):
        name, head = (
            f"model.language_model.layers.{index}.self_attn",
            512 if index % 5 == 4 else 256,
        )
        redundant[f"{name}.k_proj.weight"] = redundant[f"{name}.v_proj.weight"] = (
            "BF16",
            (head, 1536),
        )
        redundant[f"{name}.k_norm.weight"] = ("BF16", (head,))
    report = plan(tmp_path, "E2B", redundant)
    assert report.loads
    assert report.plan is not None
    assert len(report.plan.dropped) == 60
    assert report.nbytes == family.nbytes(tensors)
    (dropped,) = report.dropped
    assert dropped.count == 60
    assert all("layers.{15-34}" in where for where in dropped.where)


def test_omlx_1775_31b_w4a16_has_410_quantized_linears_and_1231_tensors(tmp_path: Path) -> None:
    tensors = family.quantized(family.layout("31B"), family.w4a16)
    tensors["lm_head.weight"] = ("BF16", (family.VOCABULARY, 5376))
    dense = family.layout("31B")
    assert len(set(tensors) - set(dense)) == 1231
    claimed = family.claim("pack-quantized", INT4)
    report = plan(tmp_path, "31B", tensors, quantization_config=claimed)
    assert report.loads, report.text()
    assert report.plan is not None
    assert report.plan.has_head
    assert sum(read.scheme.name == "int4 g32" for read in report.plan.sites) == 410
    assert report.nbytes == family.nbytes(tensors)


@pytest.mark.parametrize("member", ["E2B", "E4B", "12B"])
def test_googles_w4a16_of_the_other_sizes(member: str, tmp_path: Path) -> None:
    tensors = family.quantized(family.layout(member), family.w4a16)
    claimed = family.claim("pack-quantized", INT4)
    report = plan(tmp_path, member, tensors, quantization_config=claimed)
    assert report.loads, report.text()
    assert report.nbytes == family.nbytes(tensors)
    assert {note.detail for note in report.notes} <= {UNMATCHED}


def calibrated_26b() -> Layout:
    return family.quantized(family.layout("26B-A4B"), family.nvfp4_calibrated)


def test_26b_per_expert_nvfp4_in_500_megabytes_and_3_seconds(tmp_path: Path) -> None:
    """47,648 tensors, whose scales of activations the configuration does not use.

    The seconds are of the processor, those of importing included: no clock of a busy machine.
    The peak is VmHWM: `ru_maxrss` of a child begins with the size of the process that started it.
    """
    tensors = calibrated_26b()
    assert len(tensors) == 47_648
    claimed = family.claim("nvfp4-pack-quantized", FP4)
    described = family.config("26B-A4B") | {"quantization_config": claimed}
    family.write_headers(tmp_path, tensors, described)
    program = (
        "import json, sys, time; from pathlib import Path;"
        "from cabochon.load.report import inspect_checkpoint;"
        "r = inspect_checkpoint(Path(sys.argv[1])); d = r.as_dict(); r.text();"
        "status = Path('/proc/self/status').read_text();"
        "peak = int(status.partition('VmHWM:')[2].split()[0]) * 1024;"
        "print(json.dumps([d['verdict'], d['bytes'], d['groups'], peak, time.process_time()]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    verdict, read, groups, peak, _ = json.loads(runs[0].stdout)
    assert min(json.loads(run.stdout)[-1] for run in runs) < 3
    assert verdict == "loads"
    scales = {n: t for n, t in tensors.items() if n.endswith("input_global_scale")}
    assert read == family.nbytes(tensors) - family.nbytes(scales)
    counts = {(row["group"], row["scheme"]): row["count"] for row in groups}
    assert counts["experts", "nvfp4"] == 30 * 128 * 3
    assert counts["attention", "nvfp4"] == 115
    assert counts["mlp", "nvfp4"] == 90
    assert peak < 500e6


def test_26b_nvfp4_with_quantized_activations(tmp_path: Path) -> None:
    claimed = family.claim("nvfp4-pack-quantized", FP4, family.LOCAL)
    report = plan(tmp_path, "26B-A4B", calibrated_26b(), quantization_config=claimed)
    assert report.loads, report.text()
    assert report.nbytes == family.nbytes(calibrated_26b())
    stored = {row["scheme"] for row in report.as_dict()["groups"]}
    assert stored == {"bf16", "nvfp4, inputs fp4 g16 e4m3"}


def test_26b_with_activations_that_are_not_supported_is_refused_in_few_lines(
    tmp_path: Path,
) -> None:
    claimed = family.claim("nvfp4-pack-quantized", FP4, {"num_bits": 6, "type": "float"})
    report = plan(tmp_path, "26B-A4B", calibrated_26b(), quantization_config=claimed)
    assert not report.loads
    assert len(report.text().splitlines()) <= 30
    assert "input_activations of 6-bit float are not supported" in report.text()


def test_26b_nvfp4_by_modelopt(tmp_path: Path) -> None:
    tensors = family.quantized(family.layout("26B-A4B"), family.modelopt_nvfp4)
    ignore = ["lm_head", "*router*", "*embed*", "model.vision_tower*"]
    claimed = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ignore}
    report = plan(tmp_path, "26B-A4B", tensors, quantization_config=claimed)
    assert report.loads, report.text()
    assert report.nbytes == family.nbytes(tensors)


def test_dimensions_that_are_no_multiples_of_128(tmp_path: Path) -> None:
    """vLLM #43227: 704 columns in groups of 128 are six groups, the last of them half full."""
    tensors = family.quantized(family.layout("26B-A4B"), lambda *m: grouped(128, *m))
    claimed = family.claim("pack-quantized", INT4 | {"group_size": 128})
    report = plan(tmp_path, "26B-A4B", tensors, quantization_config=claimed)
    assert report.loads, report.text()
    name = "model.language_model.layers.0.experts.0.down_proj.weight_scale"
    assert tensors[name] == ("BF16", (2816, 6))


def grouped(group: int, module: str, rows: int, columns: int) -> Layout:
    made = family.w4a16(module, rows, columns)
    made[f"{module}.weight_scale"] = ("BF16", (rows, -(-columns // group)))
    return made
