"""FP8 with `weight_scale_inv`: what transformers quantizes is read as transformers decodes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import Config, Tensors, altered, config_of, load_model, plan_of, tensors_of
from conftest import FIXTURES, MEMBERS
from test_schemes import check
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from upstream import reference, same_answers

from cabochon.errors import LoadError
from cabochon.load.report import inspect_checkpoint
from cabochon.nn.activations import RoundedWeight
from cabochon.quant.byte_codes import ByteCodes
from cabochon.quant.scheme import Site

TEXT = re.compile(r"model\.language_model\.layers\.\d+\.(self_attn|mlp|experts)\..*proj(\.weight)?")
GATE = "model.language_model.layers.1.mlp.gate_proj"
BLOCK = [16, 32]


def quantizer(block: list[int] | None) -> Any:
    return SimpleNamespace(
        quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt="float")
    )


def converted(block: list[int] | None, static: bool = False) -> Callable[[Tensors], object]:
    """Every matrix of the text model as transformers' own quantizer makes it."""

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if TEXT.fullmatch(n)]:
            made = Fp8Quantize(quantizer(block)).convert({name: tensors.pop(name)})
            tensors |= {n: t.reshape(()) if t.numel() == 1 else t for n, t in made.items()}
            if static:
                module = name.removesuffix(".weight")
                if ".experts." in module:  # one for each, in one tensor
                    tensors[f"{module}_activation_scale"] = torch.full((8,), 0.02)
                else:
                    tensors[f"{module}.activation_scale"] = torch.tensor(0.02)

    return change


def described(block: list[int] | None, scheme: str = "dynamic") -> Callable[[Config], object]:
    def change(config: Config) -> None:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": scheme,
            "weight_block_size": block,
            "modules_to_not_convert": SKIPPED,
        }

    return change


UNMATCHED = "this rule of quantization_config matches nothing; the file decides"
SKIPPED = [
    "lm_head", "model.vision_tower", "model.vision_embedder", "model.embed_vision",
    "model.audio_tower", "model.embed_audio", "router.proj", "per_layer_input_gate",
    "per_layer_projection", "per_layer_model_projection",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[int] | None], Path]:
    folders: dict[tuple[str, str], Path] = {}

    def make(member: str, block: list[int] | None) -> Path:
        key = member, str(block)
        if key not in folders:
            source, target = FIXTURES / f"{member}-bf16", tmp_path_factory.mktemp(member)
            folders[key] = altered(target, source, converted(block), described(block))
        return folders[key]

    return make


def upstream(codes: Tensor, scales: Tensor) -> Tensor:
    dense: Tensor = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    return dense


def dense(folder: Path) -> Tensors:
    stored = tensors_of(folder)
    for name in [n for n in stored if n.endswith("scale_inv")]:
        codes = name.removesuffix("_scale_inv")
        stored[codes] = upstream(stored[codes], stored.pop(name))
    return stored


Make = Callable[[str, list[int] | None], Path]


@pytest.mark.parametrize("block", [BLOCK, None], ids=["blocks", "tensor"])
@pytest.mark.parametrize("member", ["e2b", "26b"])
def test_every_matrix_equals_upstreams_decoding(
    made: Make, member: str, block: list[int] | None
) -> None:
    if member == "26b" and block is None:
        block = [32, 32]  # stacked experts have a scale each, not one for all
    folder = made(member, block)
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


@pytest.mark.parametrize("member", MEMBERS)
def test_answers_are_those_of_upstreams_decoding(made: Make, tmp_path: Path, member: str) -> None:
    folder = made(member, BLOCK)
    same_answers(folder, reference(folder, dense(folder), tmp_path), weights_only=True)


def rounded(x: Tensor, group: int) -> Tensor:
    """A token's activations in groups, each with a scale: DeepSeek-V3's way, section 3.3.2."""
    blocks = x.unflatten(-1, (-1, group))
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 448
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def test_activations_are_rounded_in_groups_unless_weights_only(made: Make) -> None:
    folder = made("31b", BLOCK)
    model, _ = load_model(folder, dtype=torch.float32)
    weight = model.get_submodule(GATE).weight
    torch.manual_seed(0)
    x = torch.randn(5, weight.in_features)
    expected = rounded(x, BLOCK[1]) @ weight.dense(torch.float32).T
    torch.testing.assert_close(weight.linear(x), expected, rtol=1e-5, atol=1e-5)


def test_static_scales_of_activations(tmp_path: Path) -> None:
    source = FIXTURES / "26b-bf16"
    changes = converted([32, 32], static=True), described([32, 32], "static")
    report = inspect_checkpoint(altered(tmp_path / "26b", source, *changes))
    assert "activation_scale has shape [8], expected []" in report.text()
    source = FIXTURES / "31b-bf16"
    folder = altered(
        tmp_path / "31b", source, converted(BLOCK, static=True), described(BLOCK, "static")
    )
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


def test_a_reciprocal_scale_is_another_matrix(made: Make) -> None:
    """The name says inverse, and means it of what was multiplied with."""
    stored = tensors_of(made("31b", BLOCK))
    codes, scales = stored[f"{GATE}.weight"], stored[f"{GATE}.weight_scale_inv"]
    whole = tensors_of(FIXTURES / "31b-bf16")[f"{GATE}.weight"].float()
    scheme = ByteCodes("fp8", (16, 32), scale="weight_scale_inv")
    site = Site("w", "linear", *codes.shape)
    found = scheme.build({"weight": codes, "weight_scale_inv": scales}, site)
    assert (found.dense(torch.float32) - whole).abs().max() < 0.04 * whole.abs().max()
    turned = scheme.build({"weight": codes, "weight_scale_inv": 1 / scales}, site)
    assert (turned.dense(torch.float32) - whole).abs().max() > whole.abs().max()


def test_a_scale_that_is_no_number(made: Make, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[f"{GATE}.weight_scale_inv"][0, 0] = torch.nan

    with pytest.raises(LoadError, match="weight_scale_inv' has 1 of"):
        load_model(altered(tmp_path, made("31b", BLOCK), spoil), dtype=torch.float32)


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
    made: Make, tmp_path: Path, change: Callable[[Config], object], wanted: str
) -> None:
    report = inspect_checkpoint(altered(tmp_path, made("31b", BLOCK), config=change))
    assert not report.loads
    assert wanted in report.text()


def test_the_plan_names_its_schemes(made: Make) -> None:
    names = {r.stored_as for r in plan_of(made("31b", None)).sites if r.scheme.bits == 8}
    assert names == {"fp8 tensor, inputs fp8 per token"}
    assert config_of(made("31b", None))["quantization_config"]["weight_block_size"] is None
