"""NVFP4 weights: both layouts equal what their producers decompress, neither passes as the other.

compressed-tensors decides on its own files. ModelOpt's layout is written here from its description
(the same codes and block scales, `weight` and `weight_scale_2 = amax / (448 * 6)`, to multiply by),
so that what comes out must be the very matrix that compressed-tensors makes of the same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    NVFP4,
    Config,
    Tensors,
    altered,
    config_of,
    load_model,
    plan_of,
    tensors_of,
)
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schemes import check

from cabochon.errors import LoadError
from cabochon.load.report import inspect_checkpoint
from cabochon.quant.nvfp4 import Nvfp4
from cabochon.quant.scheme import Site

E2B, MOE = NVFP4
GATE = "model.language_model.layers.1.mlp.gate_proj"
UPSTREAM = preset_name_to_scheme("NVFP4A16", ["Linear"])


def upstream(stored: Tensors) -> torch.Tensor:
    return NVFP4PackedCompressor.decompress(stored, UPSTREAM)["weight"]


def modelopt(tensors: Tensors) -> None:
    """The checkpoint as ModelOpt would have written it."""
    for name in [n for n in tensors if n.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        tensors[f"{module}.weight"] = tensors.pop(name)
        whole = tensors.pop(f"{module}.weight_global_scale")
        tensors[f"{module}.weight_scale_2"] = (1 / whole).reshape(())


def described_by_modelopt(config: Config) -> None:
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
        "ignore": ["lm_head", "model.vision_tower*", "model.audio_tower*", "model.embed_[va]*"],
        "producer": {"name": "modelopt"},
    }


@pytest.mark.parametrize("folder", NVFP4, ids=lambda folder: folder.name)
def test_every_matrix_equals_upstreams_decompression(folder: Path) -> None:
    model, report = load_model(folder, dtype=torch.float32)
    assert report.plan is not None
    stored = tensors_of(folder)
    assert {read.scheme.name for read in report.plan.sites} == {"bf16", "nvfp4"}
    for read in report.plan.sites:
        tensors = {leaf: stored[meta.name] for leaf, meta in read.stored.items()}
        expected = upstream(tensors) if "weight_packed" in tensors else tensors["weight"]
        weight = model.get_submodule(read.site.name).weight
        check(weight if read.part is None else weight.parts[read.part], expected)


@pytest.mark.parametrize("folder", NVFP4, ids=lambda folder: folder.name)
def test_claims_are_upstreams_own_reading_of_the_configuration(folder: Path) -> None:
    (group,) = config_of(folder)["quantization_config"]["config_groups"].values()
    weights = QuantizationScheme.model_validate(group).weights
    assert weights is not None
    assert (weights.num_bits, weights.type, weights.group_size) == (4, "float", 16)
    plan = plan_of(folder)
    assert not plan.notes
    schemes = {read.scheme for read in plan.sites if read.scheme.bits == 4}
    assert schemes == {Nvfp4("compressed-tensors")}


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(1, 6),
    out=st.integers(1, 40),
    spread=st.sampled_from([1e-4, 0.02, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_odd_sizes_and_magnitudes(blocks: int, out: int, spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(out, 16 * blocks) * spread
    whole = (448 * 6 / weight.abs().max()).reshape(1)
    scales = weight.view(out, blocks, 16).abs().amax(dim=-1) / 6 * whole
    state = {"weight": weight, "weight_scale": scales.to(torch.float8_e4m3fn).float()}
    stored = NVFP4PackedCompressor.compress(state | {"weight_global_scale": whole}, UPSTREAM)
    site = Site("w", "linear", out, 16 * blocks)
    expected = upstream(stored)
    check(Nvfp4("compressed-tensors").build(stored, site), expected)
    modelopt(named := {f"w.{leaf}": tensor for leaf, tensor in stored.items()})
    theirs = {name.removeprefix("w."): tensor for name, tensor in named.items()}
    found = Nvfp4("modelopt").build(theirs, site).dense(torch.float32)
    # the reciprocal is rounded once more
    torch.testing.assert_close(found, expected.float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("folder", NVFP4, ids=lambda folder: folder.name)
def test_modelopts_layout_is_the_same_model(tmp_path: Path, folder: Path) -> None:
    ours, report = load_model(
        altered(tmp_path, folder, modelopt, described_by_modelopt), dtype=torch.float32
    )
    theirs, _ = load_model(folder, dtype=torch.float32)
    assert report.plan is not None
    assert {read.scheme.name for read in report.plan.sites} == {"bf16", "nvfp4 modelopt"}
    assert not [note for note in report.notes if note.where[0].startswith("model.")]
    for read in report.plan.sites:
        found = ours.get_submodule(read.site.name).weight.dense(torch.float32)
        expected = theirs.get_submodule(read.site.name).weight.dense(torch.float32)
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_swapped_nibbles_are_another_matrix() -> None:
    """The layout that another producer uses would be noticed by the tests above."""
    stored = {
        leaf: tensors_of(E2B)[f"{GATE}.{leaf}"]
        for leaf in ("weight_packed", "weight_scale", "weight_global_scale")
    }
    codes = stored["weight_packed"]
    site = Site("w", "linear", codes.shape[0], 2 * codes.shape[1])
    swapped = stored | {"weight_packed": (codes << 4) | (codes >> 4)}
    found = Nvfp4("compressed-tensors").build(swapped, site).dense(torch.float32)
    expected = upstream(stored).float()
    assert not torch.allclose(found, expected, rtol=0.1, atol=0.01)
    assert torch.equal(found.unflatten(1, (-1, 2)).flip(-1).flatten(1), expected)


def reciprocal(leaf: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[f"{GATE}.{leaf}"] = 1 / tensors[f"{GATE}.{leaf}"]

    return change


def both(*changes: Callable[[Tensors], object]) -> Callable[[Tensors], object]:
    return lambda tensors: [change(tensors) for change in changes]


REVERSED = {
    "compressed-tensors": (reciprocal("weight_global_scale"), lambda config: None),
    "modelopt": (both(modelopt, reciprocal("weight_scale_2")), described_by_modelopt),
}


@pytest.mark.parametrize("layout", REVERSED)
def test_a_global_scale_of_the_other_convention_is_refused(tmp_path: Path, layout: str) -> None:
    """modular #6697, #6699: confused, weights are wrong by the square of the scale."""
    folder = altered(tmp_path, E2B, *REVERSED[layout])
    assert inspect_checkpoint(folder).loads  # headers cannot tell
    with pytest.raises(LoadError, match="reciprocal") as error:
        load_model(folder, dtype=torch.float32)
    assert GATE in str(error.value)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), -1.0])
def test_global_scales_that_cannot_be(tmp_path: Path, value: float) -> None:
    folder = altered(tmp_path, E2B, lambda t: t[f"{GATE}.weight_global_scale"].fill_(value))
    with pytest.raises(LoadError, match="weight_global_scale"):
        load_model(folder, dtype=torch.float32)


def test_a_block_scale_that_is_no_number(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{GATE}.weight_scale"].view(torch.uint8)[3, 1] = 0xFF

    with pytest.raises(LoadError, match="weight_scale' has 1 of"):
        load_model(altered(tmp_path, E2B, spoil), dtype=torch.float32)


def test_one_number_may_be_a_list_of_one(tmp_path: Path) -> None:
    """vLLM #39045, modular #6773: `[1]` and `[]`."""

    def unlist(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith("weight_global_scale")]:
            tensors[name] = tensors[name].reshape(())

    assert inspect_checkpoint(altered(tmp_path, E2B, unlist)).loads


def refused(folder: Path) -> str:
    report = inspect_checkpoint(folder)
    assert not report.loads
    return report.text()


def with_activations(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.endswith("weight_global_scale")]:
        tensors[name.replace("weight_global", "input_global")] = torch.ones(1)


def claiming_nothing(config: Config) -> None:
    del config["quantization_config"]


def test_scales_of_activations_that_are_not_quantized_are_dropped(tmp_path: Path) -> None:
    """Calibration leaves them behind; the configuration says that they are of no use."""
    report = inspect_checkpoint(altered(tmp_path, E2B, with_activations))
    assert report.loads
    (dropped,) = report.dropped
    assert dropped.detail == "a scale of activations, which are not quantized here"
    assert all("input_global_scale" in where for where in dropped.where)


def algorithm(name: str) -> Callable[[Config], object]:
    def change(config: Config) -> None:
        described_by_modelopt(config)
        config["quantization_config"]["quant_algo"] = name

    return change


def test_scales_of_activations_need_a_claim(tmp_path: Path) -> None:
    text = refused(altered(tmp_path, E2B, with_activations, claiming_nothing))
    assert "input_global_scale rounds activations, and config.json does not say how" in text


def test_modelopts_algorithms_that_change_activations_want_their_scales(tmp_path: Path) -> None:
    for name in ("NVFP4", "NVFP4_AWQ"):
        text = refused(altered(tmp_path / name, E2B, modelopt, algorithm(name)))
        assert "input_scale is missing (--weights-only does without)" in text
    text = refused(altered(tmp_path / "mixed", E2B, modelopt, algorithm("MIXED_PRECISION")))
    assert "without quantized_layers" in text


def test_the_file_decides_between_the_layouts(tmp_path: Path) -> None:
    """A configuration of the other producer is noted; names say which convention it is."""
    folder = altered(tmp_path, E2B, config=described_by_modelopt)
    report = inspect_checkpoint(folder)
    assert report.loads
    assert any("says nvfp4 modelopt, the tensors are nvfp4" in n.detail for n in report.notes)
