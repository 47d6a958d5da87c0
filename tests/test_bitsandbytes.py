"""bitsandbytes: what it and transformers write is read bit for bit as bitsandbytes decodes it.

bitsandbytes' pure-torch decoder is the judge: its kernel for processors with AVX-512 (0.50.2) is
wrong for some matrices whose rows are no multiple of a block.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from checkpoints import (
    Config,
    Tensors,
    altered,
    config_of,
    load_model,
    meta_of,
    plan_of,
    tensors_of,
)
from conftest import FIXTURES, MEMBERS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schemes import check
from torch import Tensor
from upstream import reference, same_answers
from written import BITSANDBYTES, written

from cabochon.errors import LoadError
from cabochon.load.report import inspect_checkpoint
from cabochon.quant.bitsandbytes import TABLES, Bnb4, LlmInt8, candidates
from cabochon.quant.scheme import Site, differences

SCHEMES = {
    "nf4": Bnb4("nf4"),
    "nf4-double": Bnb4("nf4", double=True, storage="BF16"),
    "fp4": Bnb4("fp4"),
    "fp4-double": Bnb4("fp4", double=True),
    "int8": LlmInt8(),
}
GATE = "model.language_model.layers.1.mlp.gate_proj"
STATE = f"{GATE}.weight.quant_state.bitsandbytes__nf4"


def made(member: str, kind: str) -> Path:
    """A checkpoint of a member, quantized and saved by transformers and bitsandbytes."""
    return written(f"bitsandbytes {kind}", member)


def upstream(stored: Tensors) -> Tensor:
    """The matrix of tensors by leaf, as bitsandbytes decodes it."""
    if "SCB" in stored:
        return bnb.int8_vectorwise_dequant(stored["weight"], stored["SCB"])
    state = bnb.QuantState.from_dict(
        {leaf: tensor for leaf, tensor in stored.items() if leaf != "weight"}, device="cpu"
    )
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    octets = stored["weight"].view(torch.uint8).flatten()
    decode = _dequantize_4bit_compute.__wrapped__  # as written, not compiled
    dense: Tensor = decode(
        octets, scales.float(), state.code, state.blocksize, state.shape, state.dtype
    )
    return dense


def dense(folder: Path) -> Tensors:
    """All matrices as bitsandbytes decodes them, all other tensors as they are."""
    stored, read = tensors_of(folder), {}
    for site in plan_of(folder).sites:
        leaves = {leaf: stored.pop(meta.name) for leaf, meta in site.stored.items()}
        quantized = len(leaves) > 1
        name = f"{site.site.name}.weight" if quantized else site.stored["weight"].name
        read[name] = upstream(leaves) if quantized else leaves["weight"]
    return stored | read


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_every_matrix_equals_upstreams_decoding(member: str, kind: str) -> None:
    folder = made(member, kind)
    model, report = load_model(folder, dtype=torch.float32)
    assert report.plan is not None
    stored = tensors_of(folder)
    found = {read.scheme for read in report.plan.sites if read.scheme.bits <= 8}
    assert found == {SCHEMES[kind]}
    for read in report.plan.sites:
        if read.scheme in found:
            expected = upstream({leaf: stored[m.name] for leaf, m in read.stored.items()})
            check(model.get_submodule(read.site.name).weight, expected)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_answers_are_those_of_upstreams_decoding(tmp_path: Path, member: str, kind: str) -> None:
    folder = made(member, kind)
    same_answers(folder, reference(folder, dense(folder), tmp_path), count=4)


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_claims_are_what_is_stored(kind: str) -> None:
    notes = plan_of(made("e2b", kind)).notes
    assert ["activations, but" in note.detail for note in notes] == [True] * (kind == "int8")


def test_experts_stay_dense() -> None:
    """bitsandbytes replaces linear layers, and experts are none."""
    recipe, *notes = sorted(plan_of(made("26b", "int8")).notes, key=lambda note: len(note.where))
    assert "here they are not rounded" in recipe.detail
    assert len(notes) == 12
    assert all(".experts." in n.where and "stores it dense" in n.detail for n in notes)


def quantized(weight: Tensor, **options: Any) -> Tensors:
    codes, state = bnb.quantize_4bit(weight, **options)
    return {"weight": codes} | {f"weight.{n}": t for n, t in state.as_dict(packed=True).items()}


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    half=st.integers(1, 90),
    block=st.sampled_from([32, 64, 128, 4096]),
    codes=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_blocks_that_span_rows(
    out: int, half: int, block: int, codes: str, double: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(out, 2 * half) * torch.rand(out, 1)).to(dtype)
    stored = quantized(weight, blocksize=block, quant_type=codes, compress_statistics=double)
    scheme, site = found(stored, out, 2 * half)
    check(scheme.build(stored, site), upstream(stored))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_codes_stored_under_any_dtype(storage: torch.dtype) -> None:
    """vLLM #42825 took such bytes for numbers; here they are none."""
    torch.manual_seed(0)
    stored = quantized(torch.randn(24, 96).bfloat16(), quant_type="nf4", quant_storage=storage)
    assert stored["weight"].dtype is storage
    scheme, site = found(stored, 24, 96)
    check(scheme.build(stored, site), upstream(stored))


def found(stored: Tensors, out: int, width: int) -> tuple[Bnb4, Site]:
    """The scheme in which the tensors fit, and the matrix that they are."""
    site = Site("w", "linear", out, width)
    metas = {leaf: meta_of(leaf, tensor) for leaf, tensor in stored.items()}
    (scheme,) = candidates(site, metas)
    assert isinstance(scheme, Bnb4)
    assert not differences(scheme, metas, site)
    return scheme, site


def test_the_tables_are_upstreams() -> None:
    for codes, table in TABLES.items():
        theirs = bnb.get_4bit_type(codes, device="cpu")
        torch.testing.assert_close(torch.tensor(table), theirs, rtol=0, atol=1e-6)


def test_the_decoder_that_judges_is_near_what_was_quantized() -> None:
    """Also where blocks span rows: upstream's kernel is far off for widths of 32, 48 and 96."""
    torch.manual_seed(0)
    for width in (32, 48, 96, 100, 256):
        weight = torch.randn(12, width) * torch.arange(1.0, 13)[:, None]
        dense = upstream(quantized(weight, quant_type="nf4"))
        blocks = weight.flatten().split(64)
        errors = (dense - weight).flatten().split(64)
        for block, error in zip(blocks, errors, strict=True):
            assert (
                error.abs().max() < 0.16 * block.abs().max()
            )  # half the widest step, and rounding


def test_swapped_nibbles_and_reciprocal_scales_are_another_matrix() -> None:
    torch.manual_seed(0)
    stored = quantized(torch.randn(16, 128) / 16, quant_type="nf4")
    scheme, site = found(stored, 16, 128)
    expected = upstream(stored)
    codes = stored["weight"]
    swapped = scheme.build(stored | {"weight": (codes << 4) | (codes >> 4)}, site)
    turned = swapped.dense(torch.float32)
    assert not torch.allclose(turned, expected, atol=0.01)
    assert torch.equal(turned.unflatten(1, (-1, 2)).flip(-1).flatten(1), expected)
    reciprocal = stored | {"weight.absmax": 1 / stored["weight.absmax"]}
    other = scheme.build(reciprocal, site).dense(torch.float32)
    assert not torch.allclose(other, expected, rtol=0.5)


def state(**changes: Any) -> Callable[[Tensors], object]:
    """The JSON beside a matrix, changed."""

    def change(tensors: Tensors) -> None:
        said = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return change


def fill(leaf: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[f"{GATE}.{leaf}"].view(-1)[3:4].fill_(value)


DAMAGE: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "another table": ("nf4", fill("weight.quant_map", 3.0)),
    "a table that is no number": ("nf4", fill("weight.quant_map", float("nan"))),
    "another shape": ("nf4", state(shape=[64, 96])),
    "another kind": ("nf4", state(quant_type="fp4")),
    "a block of another size": ("nf4", state(blocksize=32)),
    "no block": ("nf4", state(blocksize=0)),
    "a dtype of integers": ("nf4", state(dtype="int8")),
    "no JSON": ("nf4", lambda tensors: tensors[STATE].fill_(0)),
    "an offset that is no number": ("nf4-double", state(nested_offset="x")),
    "outer blocks of another size": ("nf4-double", state(nested_blocksize=128)),
    "an outer table that falls": ("nf4-double", fill("weight.nested_quant_map", 0.9)),
    "a scale that is no number": ("nf4", fill("weight.absmax", float("inf"))),
    "entries in another order": ("int8", lambda t: t[f"{GATE}.weight_format"].fill_(1)),
    "a row's scale that is no number": ("int8", fill("SCB", float("nan"))),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_that_headers_do_not_show_is_refused_by_name(tmp_path: Path, case: str) -> None:
    kind, change = DAMAGE[case]
    folder = altered(tmp_path, made("e2b", kind), change)
    assert inspect_checkpoint(folder).loads
    with pytest.raises(LoadError, match=r"layers\.1\.mlp\.gate_proj"):
        load_model(folder, dtype=torch.float32)


def drop(leaf: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{GATE}.{leaf}")


def cut(leaf: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[f"{GATE}.{leaf}"] = tensors[f"{GATE}.{leaf}"][:-1]

    return change


MISFITS: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no table": ("nf4", drop("weight.quant_map"), "weight.quant_map is missing"),
    "no state": (
        "nf4",
        drop("weight.quant_state.bitsandbytes__nf4"),
        "bitsandbytes__nf4 is missing",
    ),
    "a block too few": ("nf4", cut("weight.absmax"), "weight.absmax has shape"),
    "a row too few": ("int8", cut("SCB"), "SCB has shape"),
    "no scales of scales": ("nf4-double", drop("weight.nested_absmax"), "weight.nested_absmax"),
    "no scales": ("nf4", drop("weight.absmax"), "weight.absmax is missing"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, case: str) -> None:
    kind, change, wanted = MISFITS[case]
    report = inspect_checkpoint(altered(tmp_path, made("e2b", kind), change))
    assert not report.loads
    assert GATE in report.text()
    assert wanted in report.text()


def test_modules_left_dense_are_loaded_dense(tmp_path: Path) -> None:
    """Unsloth's dynamic files leave what loses most in bfloat16, and name it."""
    whole = tensors_of(FIXTURES / "e2b-bf16")

    def leave(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(LAYER)]:
            del tensors[name]
        tensors.update({name: tensor for name, tensor in whole.items() if name.startswith(LAYER)})

    def name_them(config: Config) -> None:
        config["quantization_config"]["llm_int8_skip_modules"] = ["layers.1.mlp", *NAMED]

    folder = altered(tmp_path, made("e2b", "nf4"), leave, name_them)
    plan = plan_of(folder)
    assert not plan.problems
    assert {r.scheme.name for r in plan.sites if r.site.name.startswith(LAYER)} == {"bf16"}
    noted = {note.where for note in plan.notes}
    assert noted == {"skip:layers.1.mlp"}  # a suffix that is none: transformers skips nothing by it


LAYER = "model.language_model.layers.1.mlp."
NAMED = [f"{LAYER}{part}_proj" for part in ("gate", "up", "down")]


def test_a_head_of_four_bits(tmp_path: Path) -> None:
    """An LM head that is stored quantized is used as it is, whatever lists say of it."""
    torch.manual_seed(0)
    rows, width = tensors_of(FIXTURES / "e2b-bf16")[
        "model.language_model.embed_tokens.weight"
    ].shape
    head = quantized(torch.randn(rows, width).bfloat16() / 16, quant_type="nf4")
    folder = altered(
        tmp_path,
        made("e2b", "nf4"),
        lambda t: t.update({f"lm_head.{leaf}": tensor for leaf, tensor in head.items()}),
    )
    model, report = load_model(folder, dtype=torch.float32)
    assert report.loads
    check(model.get_submodule("lm_head").weight, upstream(head))
    assert config_of(folder)["tie_word_embeddings"]
