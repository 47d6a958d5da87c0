"""torchao: what transformers and torchao save is read as torchao decodes it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Tensors, load_model, tensors_of
from conftest import FIXTURES, MEMBERS
from ct import layers_of
from guided import rounds, same_logits, seam
from safetensors import safe_open
from safetensors.torch import save_file
from test_schemes import check
from torch import Tensor
from torch.nn import functional
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization.granularity import PerRow
from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor
from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx
from upstream import reference, same_answers
from written import OF_PARAMETERS, TORCHAO, written

from cabochon.errors import ConfigError, UnreadableError
from cabochon.load.plan import SiteRead
from cabochon.load.report import inspect_checkpoint
from cabochon.nn.activations import RoundedWeight

STORED_AS = {
    "int8": {"int8 channel asymmetric"},
    "int8-dynamic": {"int8 channel asymmetric, inputs int8 per token"},
    "fp8": {"fp8 channel"},
    "int4": {"int8 g32 asymmetric"},
    "int8-int4": {"int8 g32 asymmetric, inputs int8 per token asymmetric"},
}
# Where a row of a tower is one group; the encoder-free model has none.
ROWS = {
    "int4": {"int8 channel asymmetric"},
    "int8-int4": {"int8 channel asymmetric, inputs int8 per token asymmetric"},
}
GATE = "model.language_model.layers.1.mlp.gate_proj"


def made(member: str, kind: str) -> Path:
    """A checkpoint of a member, quantized and saved by transformers and torchao."""
    return written(f"torchao {kind}", member)


def header(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict(file.metadata())


def as_stored(labels: dict[str, str]) -> dict[str, str]:
    """transformers renames tensors of the encoder-free model when it saves them; not the header."""

    def rename(text: str) -> str:
        text = text.replace("model.embed_vision.multimodal_embedder.", "model.embed_vision.")
        return re.sub(r"model\.embed_vision\.(patch_|pos_)", r"model.vision_embedder.\1", text)

    return {rename(name): rename(text) for name, text in labels.items()}


def decoded(folder: Path) -> Tensors:
    """All tensors as torchao puts them together and decodes them."""
    whole, left = unflatten_tensor_state_dict(tensors_of(folder), as_stored(header(folder)))
    assert not left
    return {n: t.dequantize() if hasattr(t, "qdata") else t for n, t in whole.items()}


def stored_name(read: SiteRead) -> str:
    """What torchao's header calls a matrix; stacked experts are parameters."""
    return read.site.name if read.site.kind == "experts" else f"{read.site.name}.weight"


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("kind", TORCHAO)
def test_every_matrix_equals_upstreams_decoding(member: str, kind: str) -> None:
    folder = made(member, kind)
    model, report = load_model(folder, dtype=torch.float32)
    assert report.plan is not None
    assert not report.plan.notes
    expected = decoded(folder)
    quantized = [read for read in report.plan.sites if len(read.stored) > 1]
    assert len(quantized) > 20
    rows = set() if member == "12b" else ROWS.get(kind, set())
    assert {read.stored_as for read in quantized} == STORED_AS[kind] | rows
    experts = [read for read in quantized if read.site.kind == "experts"]
    assert len(experts) == (12 if member == "26b" and kind in OF_PARAMETERS else 0)
    for read in quantized:
        weight = model.get_submodule(read.site.name).weight
        weight = weight.weight if isinstance(weight, RoundedWeight) else weight
        theirs = expected[stored_name(read)]
        assert torch.equal(weight.dense(theirs.dtype), theirs.flatten(0, -2)), read.site.name
        check(weight, weight.dense(torch.float32))


# What torchao does to the inputs of a matrix.
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "int8-dynamic": lambda x: Int8Tensor.from_hp(x, PerRow()).dequantize(),
    "int8-int4": intx._apply_int8_act_asym_per_token_quant_dequant,
}


def simulate(name: str, module: Any, inputs: Callable[[Tensor], Tensor]) -> None:
    def rounded(x: Tensor) -> Tensor:
        return inputs(x.flatten(0, -2)).view(x.shape)

    module.forward = rounds(name, module.forward, rounded)


def simulate_experts(name: str, module: Any, inputs: Callable[[Tensor], Tensor]) -> None:
    """Stacked experts: gates and what they gate are one matrix of each."""

    def times(part: str, x: Tensor, expert: int) -> Tensor:
        weight = getattr(module, part)[expert]
        return functional.linear(inputs(seam(f"{name}.{part}.inputs", x)), weight)

    def forward(x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            gate, up = times("gate_up_proj", x[token], expert).chunk(2, dim=-1)
            made = times("down_proj", module.act_fn(gate) * up, expert)
            out.index_add_(0, token, made * shares[token, place, None])
        return out

    module.forward = forward


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("kind", TORCHAO)
def test_answers_are_those_of_upstreams_decoding(tmp_path: Path, member: str, kind: str) -> None:
    """In float32, in which bytes and scales multiply exactly as stored."""
    folder = made(member, kind)
    model, report = load_model(folder, dtype=torch.float32)
    assert report.plan is not None
    dense = decoded(folder)
    quantized = [read for read in report.plan.sites if len(read.stored) > 1]
    for read in quantized:
        name = stored_name(read)
        exact = model.get_submodule(read.site.name).weight.dense(torch.float32)
        exact = exact.view(dense[name].shape)
        torch.testing.assert_close(exact, dense[name].float(), rtol=2**-8, atol=0)
        dense[name] = exact
    theirs = reference(folder, dense, tmp_path)
    if kind not in INPUTS:
        same_answers(folder, theirs, count=4)
        return
    layers = layers_of(theirs)
    for read in quantized:
        if read.site.kind != "experts":
            simulate(read.site.name, layers[read.site.name], INPUTS[kind])
    for name in {r.site.name.rpartition(".")[0] for r in quantized if r.site.kind == "experts"}:
        simulate_experts(name, layers[name], INPUTS[kind])
    same_logits(folder, theirs)


@pytest.mark.parametrize("kind", INPUTS)
def test_activations_are_rounded_as_torchao_rounds_them(kind: str) -> None:
    """To the last bit: the largest entry of a token lies half way between two integers."""
    model, _ = load_model(made("31b", kind), dtype=torch.float32)
    weight = model.get_submodule(GATE).weight
    assert isinstance(weight, RoundedWeight)
    assert weight.inputs is not None
    torch.manual_seed(0)
    x = torch.randn(2000, weight.in_features)
    inputs = INPUTS[kind](x)
    assert torch.equal(weight.inputs(x), inputs)
    expected = inputs @ weight.dense(torch.float32).T
    torch.testing.assert_close(weight.linear(x), expected, rtol=1e-4, atol=1e-4)
    assert (weight.linear(x) - x @ weight.dense(torch.float32).T).abs().max() > 1e-3


def relabelled(folder: Path, source: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy whose header describes one matrix differently."""
    labels = header(source)
    said = json.loads(labels[f"{GATE}.weight"])
    change(said)
    labels[f"{GATE}.weight"] = json.dumps(said)
    folder.mkdir()
    save_file(tensors_of(source), folder / "model.safetensors", metadata=labels)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def dynamic_fp8(said: dict[str, Any]) -> None:
    kwargs = {"float8_dtype": "float8_e4m3fn", "granularity": {"_type": "PerRow", "_data": {}}}
    said["_data"]["act_quant_kwargs"] = {"_type": "QuantizeTensorToFloat8Kwargs", "_data": kwargs}


def test_fp8_with_activations(tmp_path: Path) -> None:
    """What `Float8DynamicActivationFloat8WeightConfig` stores, which no CPU may write."""
    folder = relabelled(tmp_path / "a", made("26b", "fp8"), dynamic_fp8)
    report = inspect_checkpoint(folder)
    assert report.loads
    assert report.plan is not None
    (read,) = (read for read in report.plan.sites if read.site.name == GATE)
    assert read.stored_as == "fp8 channel, inputs fp8 per token"


UNKNOWN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "tiles of a GPU": (lambda s: s.update(_type="Int4TilePackedTo4dTensor"), "Int4TilePackedTo4d"),
    "smoothing": (lambda s: s["_tensor_data_names"].append("act_pre_scale"), "act_pre_scale"),
    "blocks of rows": (lambda s: s["_data"].update(block_size=[32, 32]), "blocks of [32, 32]"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, case: str) -> None:
    change, wanted = UNKNOWN[case]
    report = inspect_checkpoint(relabelled(tmp_path / "a", made("26b", "fp8"), change))
    assert not report.loads
    assert f"{GATE}" in report.text()
    assert wanted in report.text()
    assert "is not supported by this version" in report.text()


def test_a_description_that_is_none(tmp_path: Path) -> None:
    folder = relabelled(tmp_path / "a", made("26b", "fp8"), lambda said: said.pop("_data"))
    with pytest.raises(ConfigError, match="gate_proj"):
        inspect_checkpoint(folder)


def test_a_header_that_says_nothing(tmp_path: Path) -> None:
    source = made("31b", "int8-dynamic")
    save_file(tensors_of(source), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    report = inspect_checkpoint(tmp_path)
    assert not report.loads
    assert "no header describes its tensors" in report.text()


def test_pickles_are_never_read(tmp_path: Path) -> None:
    """Files of older releases are pickled subclasses of tensors."""
    (tmp_path / "config.json").write_bytes((FIXTURES / "31b-bf16" / "config.json").read_bytes())
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnreadableError, match="pickled weights"):
        inspect_checkpoint(tmp_path)


def test_zero_points_and_scales_the_other_way_are_another_matrix() -> None:
    folder = made("31b", "int4")
    stored = tensors_of(folder)
    expected = decoded(folder)[f"{GATE}.weight"].float()
    model, _ = load_model(folder, dtype=torch.float32)
    weight = model.get_submodule(GATE).weight
    codes: Tensor = stored[f"{GATE}._weight_qdata"].float()
    scales = stored[f"{GATE}._weight_scale"].float().repeat_interleave(32, dim=1)
    assert not torch.allclose(codes / scales, expected, rtol=0.5)
    assert torch.equal(weight.dense(torch.float32), expected)
