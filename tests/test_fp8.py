"""FP8 with `weight_scale_inv`: what transformers quantizes is read as transformers decodes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import Config, Tensors, altered, config_of, load_model, plan_of, tensors_of
from conftest import FIXTURES, MEMBERS
from test_schemes import check
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from upstream import reference, same_answers
from written import fp8, written

from cabochon.errors import LoadError
from cabochon.load.report import inspect_checkpoint
from cabochon.nn.activations import RoundedWeight
from cabochon.quant.byte_codes import ByteCodes
from cabochon.quant.scheme import Site

GATE = "model.language_model.layers.1.mlp.gate_proj"


UNMATCHED = "this rule of quantization_config matches nothing; the file decides"
WAYS = ("fp8 blocks", "fp8 tensor")


def upstream(codes: Tensor, scales: Tensor) -> Tensor:
    dense: Tensor = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    return dense


def dense(folder: Path) -> Tensors:
    stored = tensors_of(folder)
    for name in [n for n in stored if n.endswith("scale_inv")]:
        codes = name.removesuffix("_scale_inv")
        stored[codes] = upstream(stored[codes], stored.pop(name))
    return stored


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("member", MEMBERS)
def test_every_matrix_equals_upstreams_decoding(member: str, way: str) -> None:
    folder = written(way, member)
    model, report = load_model(folder, dtype=torch.float32)
    assert report.plan is not None
    assert {note.detail for note in report.notes} <= {UNMATCHED}
    expected = dense(folder)
    quantized = [read for read in report.plan.sites if len(read.stored) > 1]
    assert len(quantized) == sum(1 for name in tensors_of(folder) if name.endswith("scale_inv"))
    for read in quantized:
        weight = model.get_submodule(read.site.name).weight
        assert isinstance(weight, RoundedWeight)
        check(weight.weight, expected[read.stored["weight"].name].flatten(0, -2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("member", MEMBERS)
def test_answers_are_those_of_upstreams_decoding(tmp_path: Path, member: str, way: str) -> None:
    folder = written(way, member)
    same_answers(folder, reference(folder, dense(folder), tmp_path), weights_only=True, count=4)


def rounded(x: Tensor, group: int) -> Tensor:
    """A token's activations in groups, each with a scale: DeepSeek-V3's way, section 3.3.2."""
    blocks = x.unflatten(-1, (-1, group))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 448
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def test_activations_are_rounded_in_groups_unless_weights_only() -> None:
    folder = written("fp8 blocks", "31b")
    model, _ = load_model(folder, dtype=torch.float32)
    weight = model.get_submodule(GATE).weight
    torch.manual_seed(0)
    x = torch.randn(5, weight.in_features)
    expected = rounded(x, 32) @ weight.dense(torch.float32).T
    torch.testing.assert_close(weight.linear(x), expected, rtol=1e-5, atol=1e-5)


def test_static_scales_of_activations(tmp_path: Path) -> None:
    experts = fp8(tmp_path / "26b", FIXTURES / "26b-bf16", (32, 32), static=True)
    text = inspect_checkpoint(experts).text()
    assert "activation_scale has shape [8], expected []" in text
    folder = fp8(tmp_path / "31b", FIXTURES / "31b-bf16", (16, 32), static=True)
    model, _ = load_model(folder, dtype=torch.float32)
    weight = model.get_submodule(GATE).weight
    x = torch.randn(5, weight.in_features)
    inputs = (x / 0.02).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.02
    expected = inputs @ weight.dense(torch.float32).T
    torch.testing.assert_close(weight.linear(x), expected, rtol=1e-5, atol=1e-5)


def test_a_last_block_that_is_cut_short() -> None:
    """Rows and columns that are no multiple of a block: 704, 2112 and 4304 in blocks of 128."""
    torch.manual_seed(0)
    codes = torch.randn(20, 40).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2) + 0.1
    grown = scales.repeat_interleave(16, 0)[:20].repeat_interleave(32, 1)[:, :40]
    scheme = ByteCodes("fp8", (16, 32), scale="weight_scale_inv")
    stored = {"weight": codes, "weight_scale_inv": scales}
    check(scheme.build(stored, Site("w", "linear", 20, 40)), codes.float() * grown)


def test_a_reciprocal_scale_is_another_matrix() -> None:
    """The name says inverse, and means it of what was multiplied with."""
    stored = tensors_of(written("fp8 blocks", "31b"))
    codes, scales = stored[f"{GATE}.weight"], stored[f"{GATE}.weight_scale_inv"]
    whole = tensors_of(FIXTURES / "31b-bf16")[f"{GATE}.weight"].float()
    scheme = ByteCodes("fp8", (16, 32), scale="weight_scale_inv")
    site = Site("w", "linear", *codes.shape)
    found = scheme.build({"weight": codes, "weight_scale_inv": scales}, site)
    assert (found.dense(torch.float32) - whole).abs().max() < 0.04 * whole.abs().max()
    turned = scheme.build({"weight": codes, "weight_scale_inv": 1 / scales}, site)
    assert (turned.dense(torch.float32) - whole).abs().max() > whole.abs().max()


def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{GATE}.weight_scale_inv"][0, 0] = torch.nan

    with pytest.raises(LoadError, match="weight_scale_inv' has 1 of"):
        load_model(altered(tmp_path, written("fp8 blocks", "31b"), spoil), dtype=torch.float32)


def claims(**changes: object) -> Callable[[Config], object]:
    return lambda config: config["quantization_config"].update(changes)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (claims(scale_fmt="ue8m0"), "scale_fmt 'ue8m0' is not supported"),
        (claims(activation_scheme="x"), "activation_scheme 'x'"),
        (claims(activation_scheme="static"), "activation_scale is missing (--weights-only"),
        (claims(weight_block_size=[128, 128]), "weight_scale_inv has shape"),
    ],
)
def test_claims_that_the_tensors_do_not_keep(
    tmp_path: Path, change: Callable[[Config], object], wanted: str
) -> None:
    report = inspect_checkpoint(altered(tmp_path, written("fp8 blocks", "31b"), config=change))
    assert not report.loads
    assert wanted in report.text()


def test_the_plan_names_its_schemes() -> None:
    folder = written("fp8 tensor", "31b")
    names = {r.stored_as for r in plan_of(folder).sites if r.scheme.bits == 8}
    assert names == {"fp8 tensor, inputs fp8 per token"}
    assert config_of(folder)["quantization_config"]["weight_block_size"] is None
