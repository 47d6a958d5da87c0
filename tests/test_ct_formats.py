"""Each format of compressed-tensors on each architecture, encoded by its own compressors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Tensors, load_model
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from conftest import MEMBERS
from ct import Claims, decompress, decompressed_into, modules_of, oracle, rounding
from ct_formats import ALONE, FORMATS, MIXED, scheme
from ct_writer import compress, form_of
from guided import same_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schemes import check
from written import written

from cabochon.checkpoint.headers import TensorMeta
from cabochon.load.plan import LoadPlan
from cabochon.quant.byte_codes import ByteCodes
from cabochon.quant.compressed_tensors import candidates, rules
from cabochon.quant.scheme import Scheme, Site, differences

References = Callable[[str], Any]


def check_matrices(folder: Path) -> LoadPlan:
    """Every matrix that is quantized is what upstream decompresses."""
    model, report = load_model(folder, dtype=torch.float32)
    assert not report.notes
    claims, modules = Claims(folder), modules_of(folder)
    for read in report.plan.sites:
        if read.scheme.name != "bf16":
            module = next(iter(read.stored.values())).name.rpartition(".")[0]
            weight = model.get_submodule(read.site.name).weight
            found = (weight if read.part is None else weight.parts[read.part]).dense(torch.float32)
            theirs = decompress(modules.pop(module), claims.scheme(module)).float()
            assert torch.equal(found, theirs), module
    assert not modules
    return report.plan


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", ALONE)
def test_every_format_on_every_architecture(references: References, name: str, member: str) -> None:
    _, expected, inputs = FORMATS[name]
    folder = written(f"compressed-tensors {name}", member)
    plan = check_matrices(folder)
    reads = [read for read in plan.sites if read.scheme.name != "bf16"]
    assert {read.scheme for read in reads} == {expected}
    assert {r.activations and r.activations.name for r in reads} == {inputs}
    model = rounding(decompressed_into(references(member), folder), folder)
    same_logits(folder, model)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", MIXED)
def test_several_formats_in_one_file(
    references: References, tmp_path: Path, name: str, member: str
) -> None:
    folder = written(f"compressed-tensors {name}", member)
    plan = check_matrices(folder)
    assert {read.stored_as for read in plan.sites} == {"bf16", *MIXED[name][1]}
    assert plan.has_head == (name == "a head")
    if name in ("tables", "a head"):
        model = oracle(folder, tmp_path)
    else:
        model = rounding(decompressed_into(references(member), folder), folder)
    same_logits(folder, model)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["int", "float"]),
    strategy=st.sampled_from(["tensor", "channel", "group", "block"]),
    symmetric=st.booleans(),
    rows=st.integers(1, 40),
    groups=st.integers(1, 5),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_bytes_of_odd_sizes(
    kind: str, strategy: str, symmetric: bool, rows: int, groups: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    symmetric = symmetric or kind == "float" or strategy == "block"
    size = {"group": {"group_size": 8}, "block": {"block_structure": [16, 24]}}.get(strategy, {})
    claimed = scheme(
        "naive-quantized", num_bits=8, type=kind, strategy=strategy, symmetric=symmetric, **size
    )
    stored = compress(torch.randn(rows, 8 * groups).to(dtype), claimed)
    site = Site("w", "linear", rows, 8 * groups)
    cells = {"tensor": (None, None), "channel": (1, None), "group": (1, 8), "block": (16, 24)}
    ours = ByteCodes("int8" if kind == "int" else "fp8", cells[strategy], symmetric)
    assert claim_of(claimed) == ours
    check(ours.build(stored, site), decompress(stored, claimed))


def claim_of(claimed: QuantizationScheme) -> Scheme | None:
    group = claimed.model_dump(mode="json") | {"targets": ["Linear"], "format": form_of(claimed)}
    found = rules("quantization_config", {"config_groups": {"group_0": group}})
    return found.claim(Site("w", "linear", 1, 1), ["w"]).scheme


# Blocks are of 128 by 128 unless a configuration says otherwise.
@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"FP8 block, cut short"}))
def test_a_silent_configuration_leaves_it_to_the_tensors(name: str) -> None:
    """In the dimensions of a real matrix, tensors alone tell the format."""
    claimed, expected, _ = FORMATS[name]
    site = Site("w", "linear", 96, 704)
    stored = compress(torch.randn(96, 704).bfloat16(), claimed)
    metas = {
        leaf: TensorMeta(leaf, DTYPES[tensor.dtype], tuple(tensor.shape), Path("w"), (0, 0))
        for leaf, tensor in stored.items()
        if not leaf.startswith(("input", "output"))
    }
    fitting = [s for s in candidates(site, metas) if not differences(s, metas, site)]
    assert expected in fitting
    assert {s.name.split()[0] for s in fitting} == {expected.name.split()[0]}


def test_a_scale_for_all_that_is_computed_at_once_becomes_one_a_token() -> None:
    inputs = QuantizationArgs(num_bits=8, strategy="tensor", dynamic=True)
    group = FORMATS["W8A8"][0].model_dump(mode="json") | {
        "targets": ["Linear"],
        "input_activations": inputs.model_dump(mode="json"),
    }
    found = rules("quantization_config", {"config_groups": {"group_0": group}})
    claim = found.claim(Site("w", "linear", 1, 1), ["w"])
    assert claim.activations is not None
    assert claim.activations.name == "int8 per token"
    assert ["each token has its own" in note for note in found.notes] == [True]


@pytest.mark.parametrize("value", [None, [], {}, "8", 8.5, -1, 2**70])
def test_what_is_no_number_of_bits_is_unsupported_and_no_crash(value: object) -> None:
    for end in ("weights", "input_activations"):
        group: dict[str, Any] = {"targets": ["Linear"], "weights": {"num_bits": 8}}
        group[end] = {"num_bits": value, "strategy": "channel"}
        found = rules("quantization_config", {"config_groups": {"group_0": group}})
        claim = found.claim(Site("w", "linear", 1, 1), ["w"])
        assert (claim.unsupported or claim.unrounded) is not None


@pytest.mark.parametrize("end", ["weights", "input_activations"])
def test_floats_have_no_zero_points(end: str) -> None:
    """compressed-tensors rejects them too; what is asked for must not be left out in silence."""
    floats = {"num_bits": 8, "type": "float", "dynamic": end != "weights", "strategy": "tensor"}
    group = {"targets": ["Linear"], "weights": {**floats, "dynamic": False}}
    group[end] = {**floats, "symmetric": False}
    claim = rules("quantization_config", {"config_groups": {"group_0": group}}).claim(
        Site("w", "linear", 1, 1), ["w"]
    )
    assert "asymmetric floats are not supported" in str(claim.unsupported or claim.unrounded)
    metas = {
        "weight": TensorMeta("weight", "F8_E4M3", (96, 64), Path("w"), (0, 0)),
        "weight_scale": TensorMeta("weight_scale", "BF16", (96, 1), Path("w"), (0, 0)),
        "weight_zero_point": TensorMeta("weight_zero_point", "I8", (96, 1), Path("w"), (0, 0)),
    }
    site = Site("w", "linear", 96, 64)
    assert not [s for s in candidates(site, metas) if not differences(s, metas, site)]


DTYPES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}


def gate(preset: QuantizationScheme) -> tuple[Tensors, Site]:
    torch.manual_seed(0)
    return compress(torch.randn(96, 64).bfloat16(), preset), Site("w", "linear", 96, 64)


# A convention that somebody else has, done to the tensors, so that `dense` must not be the same.
WRONG: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "swapped nibbles": (
        "MXFP4A16",
        lambda t: t.update(weight_packed=t["weight_packed"] << 4 | t["weight_packed"] >> 4),
    ),
    "a bias of 128": ("MXFP4A16", lambda t: t.update(weight_scale=t["weight_scale"] + 1)),
    "reciprocal powers": ("MXFP8", lambda t: t.update(weight_scale=254 - t["weight_scale"])),
    "reciprocal scale": ("W8A8", lambda t: t.update(weight_scale=1 / t["weight_scale"])),
    "unsigned bytes": ("W8A8", lambda t: t.update(weight=(t["weight"] ^ -128))),
    "zero point of the other sign": (
        "naive, asymmetric",
        lambda t: t.update(weight_zero_point=-t["weight_zero_point"]),
    ),
    "zero point off by one": (
        "naive, asymmetric",
        lambda t: t.update(weight_zero_point=t["weight_zero_point"] + 1),
    ),
    "high bits first": (
        "W2A16",
        lambda t: t.update(weight_packed=reversed_bytes(t["weight_packed"])),
    ),
    "blocks the other way round": (
        "FP8 block, cut short",
        lambda t: t.update(weight_scale=t["weight_scale"].flip(0, 1)),
    ),
}


def reversed_bytes(words: torch.Tensor) -> torch.Tensor:
    octets = words.view(torch.uint8)
    swapped = octets << 6 | (octets << 2 & 0x30) | (octets >> 2 & 0x0C) | octets >> 6
    return swapped.contiguous().view(torch.int32)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_convention_is_another_matrix(name: str) -> None:
    """What upstream decompresses is what we build, and not what the other convention would be."""
    form, change = WRONG[name]
    claimed, ours, _ = FORMATS[form]
    stored, site = gate(claimed)
    right = decompress(stored, claimed).float()
    assert torch.equal(ours.build(stored, site).dense(torch.float32), right)
    change(stored)
    assert not torch.allclose(ours.build(stored, site).dense(torch.float32), right, rtol=0.01)
