"""Names under which experts of real files came, each by the report of an engine that it broke."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from checkpoints import FIXTURES, NVFP4, Config, Tensors, altered, load_model, tensors_of

from cabochon.load.report import inspect_checkpoint

PACKED = FIXTURES / "26b-w4a16"
FLOATS = NVFP4[1]
DENSE = FIXTURES / "26b-bf16"

Rename = Callable[[str], str]

SPELLINGS: Mapping[str, Rename] = {
    # vLLM #40591, #40286, #40247: `layers.0.moe.experts.0.down_proj_packed`
    "underscores": lambda name: re.sub(
        r"\.experts\.(\d+\.\w+_proj)\.weight_(\w+)$", r".moe.experts.\1_\2", name
    ),
    # vLLM #41206, SGLang #22929: `moe.experts.`, where a remap would add a second `moe`
    "moe.experts": lambda name: name.replace(".experts.", ".moe.experts."),
    # an engine's own wrapper around it
    "wrapped": lambda name: name.replace("model.language_model.", "language_model.model.").replace(
        ".experts.", ".moe.experts."
    ),
}


def renamed(rename: Rename) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return change


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("source", [PACKED, FLOATS], ids=lambda folder: folder.name)
def test_spellings_of_experts_are_the_same_model(
    tmp_path: Path, source: Path, spelling: str
) -> None:
    folder = altered(tmp_path, source, renamed(SPELLINGS[spelling]))
    assert set(tensors_of(folder)) != set(tensors_of(source))
    same(folder, source)


def same(folder: Path, source: Path) -> None:
    """Both load, and every matrix of experts is the same."""
    found, report = load_model(folder, dtype=torch.float32)
    expected, _ = load_model(source, dtype=torch.float32)
    assert report.plan is not None
    names = {read.site.name for read in report.plan.sites if ".experts." in read.site.name}
    assert len(names) == 12
    for name in names:
        ours = found.get_submodule(name).weight.dense(torch.float32)
        assert torch.equal(ours, expected.get_submodule(name).weight.dense(torch.float32)), name


def test_vllm_40591_packed_experts_stacked_in_three_dimensions(tmp_path: Path) -> None:
    """`experts.down_proj_packed`, `experts.gate_up_proj_scale`, ..., a slice for each expert."""
    folder = altered(tmp_path, PACKED, stack)
    names = {n for n in tensors_of(folder) if ".layers.0.experts." in n}
    assert {n.rpartition(".")[2] for n in names} == {
        f"{projection}_{leaf}"
        for projection in ("gate_up_proj", "down_proj")
        for leaf in ("packed", "scale", "shape")
    }
    same(folder, PACKED)


def stack(tensors: Tensors) -> None:
    for index in range(6):
        experts = f"model.language_model.layers.{index}.experts"
        for leaf in ("packed", "scale"):
            parts = {
                (number, projection): tensors.pop(f"{experts}.{number}.{projection}.weight_{leaf}")
                for number in range(8)
                for projection in ("gate_proj", "up_proj", "down_proj")
            }
            fused = [torch.cat([parts[n, "gate_proj"], parts[n, "up_proj"]]) for n in range(8)]
            tensors[f"{experts}.gate_up_proj_{leaf}"] = torch.stack(fused)
            tensors[f"{experts}.down_proj_{leaf}"] = torch.stack(
                [parts[n, "down_proj"] for n in range(8)]
            )
        for name in [n for n in tensors if n.startswith(experts) and n.endswith("weight_shape")]:
            del tensors[name]
        tensors[f"{experts}.gate_up_proj_shape"] = torch.tensor([8, 64, 64])
        tensors[f"{experts}.down_proj_shape"] = torch.tensor([8, 64, 32])


def refused(folder: Path) -> str:
    report = inspect_checkpoint(folder)
    assert not report.loads
    return report.text()


LAYER = "model.language_model.layers.2"


def without(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


def stored(name: str, *shape: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=torch.bfloat16)})


EXPERTS = {
    # paroquant #53: keys the model never reads, experts uninitialised
    "switch_glu": (
        lambda t: [
            t.update({n.replace(".experts.", ".experts.switch_glu."): t.pop(n)})
            for n in list(t)
            if ".experts." in n
        ],
        "experts.switch_glu.",
    ),
    "an expert too few": (without(".layers.2.experts.5."), f"{LAYER}.experts.gate_up_proj"),
    "an expert too many": (stored(f"{LAYER}.experts.8.down_proj.weight", 64, 32), "experts.8"),
    "a projection too few": (
        without(".layers.2.experts.5.up_proj."),
        "first 5.up_proj",
    ),
    "stored twice": (stored(f"{LAYER}.experts.down_proj", 8, 64, 32), "whole and in parts"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_sglang_22929_experts_that_would_stay_uninitialised(tmp_path: Path, case: str) -> None:
    change, wanted = EXPERTS[case]
    assert wanted in refused(altered(tmp_path, PACKED, change))


@pytest.mark.parametrize("source", [DENSE, PACKED], ids=lambda folder: folder.name)
def test_a_stored_v_where_values_are_keys_is_refused_with_the_reason(
    tmp_path: Path, source: Path
) -> None:
    """TensorRT-LLM #16797: an explicit V; ours has no place for one."""
    name = f"{LAYER}.self_attn.v_proj.weight"
    text = refused(altered(tmp_path, source, stored(name, 32, 64)))
    assert name in text
    assert "attention_k_eq_v says that full layers take their values from k_proj" in text


def off(key: str, value: object) -> Callable[[Config], object]:
    return lambda config: config["text_config"].update({key: value})


def test_what_a_model_has_no_place_for_is_said_with_the_reason(tmp_path: Path) -> None:
    dense = refused(altered(tmp_path / "moe", DENSE, config=off("enable_moe_block", False)))
    assert "enable_moe_block is not set, so there are no experts" in dense
    e2b = FIXTURES / "e2b-bf16"
    flat = altered(tmp_path / "ple", e2b, config=off("hidden_size_per_layer_input", 0))
    assert "layers have no inputs of their own" in refused(flat)
    deaf = altered(tmp_path / "deaf", e2b, config=lambda c: c.update(audio_config=None))
    assert "model.audio_tower.*" in refused(deaf)
    assert "has no audio_config here" in refused(deaf)
