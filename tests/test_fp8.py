"""FP8 with `weight_scale_inv`: what transformers quantizes is read as transformers decodes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Config, Tensors, altered, config_of, load_model, plan_of, tensors_of
from conftest import FIXTURES, MEMBERS
from ct import layers_of
from guided import rounds, same_logits, seam
from test_schemes import check
from torch import Tensor
from transformers.integrations import finegrained_fp8 as upstreams
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
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


def rounded(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes of a token's activations and a scale for each group of them.

    So do DeepSeek-V3 (its report's section 3.3.2) and, after it, the kernel that transformers
    loads: `fp8_act_quant_inline` of kernels-community/finegrained-fp8.
    """
    blocks = x.unflatten(-1, (-1, group))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 448
    return (blocks / scale.clamp(min=1e-12)).to(torch.float8_e4m3fn).float(), scale


def kernel(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    block: list[int] | None,
    dtype: torch.dtype,
    activation_scale: Tensor | None = None,
) -> Tensor:
    """`matmul_2d` of kernels-community/finegrained-fp8, which is written in Triton, for GPUs.

    It multiplies codes with codes and, block by block, scales what comes out.
    """
    rows, group = block or codes.shape
    if activation_scale is None:
        inputs, shares = rounded(x, group)
    else:
        inputs = (x / activation_scale).to(torch.float8_e4m3fn).float().unflatten(-1, (-1, group))
        shares = activation_scale.expand(1, 1)
    sums = torch.einsum("...kg,okg->...ko", inputs, codes.float().unflatten(-1, (-1, group)))
    grown = scales.view(-1, inputs.shape[-2]).repeat_interleave(rows, 0).T  # [blocks, out]
    return (sums * shares * grown).sum(dim=-2).to(dtype)


def oracle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' own model of `folder`, as on a GPU but for the kernel, and guided."""
    from transformers import AutoModelForImageTextToText

    made = upstreams.FineGrainedFP8(matmul=kernel, batched_matmul=kernel, grouped_matmul=kernel)
    monkeypatch.setattr(upstreams, "_FINEGRAINED_FP8", made)
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the others make a kernel round for all experts at once
        output_loading_info=True,
    )
    assert not any(info.values()), info
    for name, module in layers_of(model).items():
        if isinstance(module, upstreams.FP8Linear):
            module.forward = rounds(name, module.forward, lambda x: x)  # the kernel does
        elif isinstance(module, upstreams.FP8Experts):
            guide_experts(name, module)
    return model.eval()


def guide_experts(name: str, experts: Any) -> None:
    """Each expert's tokens are guided, and come in their order, not that of choices."""
    forward, product = experts.forward, experts.linear
    leaves = itertools.cycle(("gate_up_proj", "down_proj"))  # as upstream calls it

    def in_order(x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        none = torch.full((len(x), experts.num_experts), experts.num_experts)
        counted = torch.zeros(none.shape).scatter(1, chosen, shares)
        y: Tensor = forward(x, none.scatter(1, chosen, chosen), counted)
        return y

    def linear(x: Tensor, *matrix: Tensor, activation_scale: Tensor | None) -> Tensor:
        given = seam(f"{name}.{next(leaves)}.inputs", x)
        y: Tensor = product(given, *matrix, activation_scale=activation_scale)
        return y

    experts.forward, experts.linear = in_order, linear


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("member", MEMBERS)
def test_answers_are_those_of_upstreams_model(
    monkeypatch: pytest.MonkeyPatch, member: str, way: str
) -> None:
    folder = written(way, member)
    same_logits(folder, oracle(folder, monkeypatch))


@pytest.mark.parametrize("member", ["e2b", "12b", "31b"])
def test_answers_with_static_scales(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, member: str
) -> None:
    """Of 26B-A4B's the experts have a scale each, and are refused (below)."""
    folder = fp8(tmp_path, FIXTURES / f"{member}-bf16", (16, 32), static=True)
    same_logits(folder, oracle(folder, monkeypatch))


def test_activations_are_rounded_in_groups_unless_weights_only() -> None:
    folder = written("fp8 blocks", "31b")
    model, _ = load_model(folder, dtype=torch.float32)
    weight = model.get_submodule(GATE).weight
    torch.manual_seed(0)
    x = torch.randn(5, weight.in_features)
    codes, scales = rounded(x, 32)
    expected = (codes * scales).flatten(-2) @ weight.dense(torch.float32).T
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
