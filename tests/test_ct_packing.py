"""Both packings of compressed-tensors, in 2 to 8 bits, and the order of columns it once stored.

What versions before 0.18 wrote is committed, with what they decompress. The current one packs here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    DENSE,
    FIXTURES,
    Config,
    Tensors,
    altered,
    load_model,
    plan_of,
    tensors_of,
)
from conftest import MEMBERS
from ct import decompress
from ct_formats import OLDER
from ct_writer import belongs, compress, matrices, order_of, padded
from dequantized import check_answers
from safetensors.torch import load_file
from test_schemes import check, compressed, upstream
from torch import Tensor
from written import written

from cabochon.errors import LoadError
from cabochon.quant.compressed_tensors import rules
from cabochon.quant.packed_int import ALIGNED, PackedInt
from cabochon.quant.scheme import Site

GATE = "model.language_model.layers.0.mlp.gate_proj"
OLD = load_file(FIXTURES / "ct-0.17.safetensors")
SITE = Site(GATE, "linear", 96, 64)
CASES = sorted({name.rpartition(".")[0] for name in OLD})


def case(name: str) -> Tensors:
    return {n.rpartition(".")[2]: t for n, t in OLD.items() if n.startswith(name + ".")}


def scheme_of(name: str) -> PackedInt:
    bits, kind, order = name.split(".")
    padded = int(bits) not in ALIGNED
    return PackedInt(int(bits), 32, kind == "symmetric", padded, order == "reordered")


def claiming(name: str, version: str | None = "0.17.0") -> Callable[[Config], object]:
    bits, kind, order = name.split(".")
    weights = {
        "num_bits": int(bits),
        "type": "int",
        "strategy": "group",
        "group_size": 32,
        "symmetric": kind == "symmetric",
        "actorder": "group" if order == "reordered" else None,
    }
    groups = {"group_0": {"targets": [GATE], "weights": weights}}
    described = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "version": version,
    }
    return lambda config: config.update(quantization_config=described)


def storing(name: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        del tensors[f"{GATE}.weight"]
        stored = case(name)
        del stored["dense"]
        tensors.update({f"{GATE}.{leaf}": tensor for leaf, tensor in stored.items()})

    return change


@pytest.mark.parametrize("name", CASES)
def test_what_old_versions_wrote(name: str) -> None:
    stored = case(name)
    expected = stored.pop("dense")
    scheme = scheme_of(name)
    for slot in scheme.slots:
        assert stored[slot.leaf].shape == tuple(SITE.extent(axis) for axis in slot.axes)
    check(scheme.build(stored, SITE), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 32])
def test_what_the_current_version_writes(bits: int, group: int | None, symmetric: bool) -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    torch.manual_seed(bits)
    scheme = PackedInt(bits, group, symmetric)
    stored = compressed(scheme, SITE, torch.bfloat16)
    for slot in scheme.slots:
        assert stored[slot.leaf].shape == tuple(SITE.extent(axis) for axis in slot.axes)
    expected = PackedQuantizationCompressor.decompress(stored, upstream(scheme))["weight"]
    check(scheme.build(stored, SITE), expected)


@pytest.mark.parametrize("version", ["0.17.0", "0.20.0", None])
@pytest.mark.parametrize("name", ["3.symmetric.plain", "5.asymmetric.plain", "6.symmetric.plain"])
def test_the_width_tells_the_packing(tmp_path: Path, name: str, version: str | None) -> None:
    folder = altered(tmp_path, DENSE, storing(name), claiming(name, version))
    model, report = load_model(folder, dtype=torch.float32)
    (read,) = (read for read in report.plan.sites if read.site.name == GATE)
    assert read.scheme == scheme_of(name)
    assert not [note for note in report.notes if GATE in note.where]
    dense = model.get_submodule(GATE).weight.dense(torch.float32)
    assert torch.equal(dense, case(name)["dense"].float())


def test_seven_old_bits_are_as_wide_as_eight_and_the_claim_tells(tmp_path: Path) -> None:
    name = "7.symmetric.plain"
    for claimed, expected in (
        (name, scheme_of(name)),
        ("8.symmetric.plain", PackedInt(8, 32, True)),
    ):
        plan = plan_of(altered(tmp_path / claimed, DENSE, storing(name), claiming(claimed)))
        assert {r.scheme for r in plan.sites if r.site.name == GATE} == {expected}


def test_where_widths_coincide_the_version_tells(tmp_path: Path) -> None:
    """30 columns of 3 bits are three words in both packings, which place them differently."""
    site = Site("w", "linear", 64, 30)
    old, new = PackedInt(3, None, True, padded=True), PackedInt(3, None, True)
    assert site.extent(old.width) == site.extent(new.width) == 3
    stored = compressed(new, site, torch.bfloat16)
    found, wrong = (s.build(stored, site).dense(torch.float32) for s in (new, old))
    assert not torch.equal(found, wrong)
    for version, expected in (
        ("0.17.0", old),
        ("0.18.0", new),
        ("0.20.1.a20261001", new),
        ("", new),
    ):
        weights = {"num_bits": 3, "strategy": "channel"}
        described = {
            "format": "pack-quantized",
            "version": version,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
        assert rules("quantization_config", described).claim(site, ["w"]).scheme == expected


@pytest.mark.parametrize("name", ["4.symmetric.reordered", "3.asymmetric.reordered"])
def test_columns_in_another_order(tmp_path: Path, name: str) -> None:
    model, report = load_model(
        altered(tmp_path, DENSE, storing(name), claiming(name)), dtype=torch.float32
    )
    assert "reordered" in {r.site.name: r.scheme.name for r in report.plan.sites}[GATE]
    dense = model.get_submodule(GATE).weight.dense(torch.float32)
    assert torch.equal(dense, case(name)["dense"].float())
    without = scheme_of(name.replace("reordered", "plain")).build(case(name), SITE)
    assert not torch.equal(without.dense(torch.float32), dense)  # it makes a difference


def test_an_order_that_upstream_only_initialized_is_none() -> None:
    stored = case("4.symmetric.plain") | {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    expected = stored.pop("dense")
    check(PackedInt(4, 32, True, reordered=True).build(stored, SITE), expected)


@pytest.mark.parametrize("spoil", [torch.zeros_like, lambda g: g + 1, lambda g: g % 2 * 5])
def test_an_order_that_cannot_be(
    tmp_path: Path, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    def change(tensors: Tensors) -> None:
        storing(name)(tensors)
        tensors[f"{GATE}.weight_g_idx"] = spoil(tensors[f"{GATE}.weight_g_idx"])

    name = "4.symmetric.reordered"
    folder = altered(tmp_path, DENSE, change, claiming(name))
    with pytest.raises(LoadError, match=rf"{GATE}.weight_g_idx does not put 32 columns into each"):
        load_model(folder, dtype=torch.float32)


def test_the_wrong_packing_is_another_matrix() -> None:
    """Packed in one way and read in the other: a shape that does not fit, or other numbers."""
    for bits in (3, 5, 6, 7):
        stored = case(f"{bits}.symmetric.plain")
        right = PackedInt(bits, 32, True, padded=True)
        wrong = PackedInt(bits, 32, True)
        assert stored["weight_packed"].shape[1] == SITE.extent(right.width)
        assert stored["weight_packed"].shape[1] != SITE.extent(wrong.width)


def unpadded(words: Tensor, bits: int, count: int) -> Tensor:
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    codes = words[:, :, None] >> shifts & (1 << bits) - 1
    return codes.flatten(1)[:, :count] - (1 << bits - 1)


@pytest.mark.parametrize("name", [case for case in CASES if case[0] in "3567"])
def test_the_older_packing_is_written_as_old_versions_wrote_it(name: str) -> None:
    stored, bits = case(name), int(name[0])
    codes = unpadded(stored["weight_packed"], bits, SITE.in_features)
    assert torch.equal(padded(codes, bits), stored["weight_packed"])
    groups = stored.get("weight_g_idx", torch.arange(SITE.in_features) // 32).long()
    zeros = torch.zeros(SITE.out_features, 2)
    if "weight_zero_point" in stored:
        zeros = unpadded(stored["weight_zero_point"].T, bits, SITE.out_features).T
        assert torch.equal(padded(zeros.T, bits).T, stored["weight_zero_point"])
    scales = stored["weight_scale"]
    dense = (codes - zeros[:, groups]).to(scales.dtype) * scales[:, groups]
    assert torch.equal(dense, stored["dense"])


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", OLDER)
def test_the_older_packing_on_every_architecture(tmp_path: Path, name: str, member: str) -> None:
    """Each matrix is what upstream makes of the same integers in its present packing."""
    groups, packing = OLDER[name]
    reordered = packing == "0.17, reordered"
    folder, source = written(f"compressed-tensors {name}", member), FIXTURES / f"{member}-bf16"
    model, report = load_model(folder, dtype=torch.float32)
    packed = [read for read in report.plan.sites if read.scheme.bits < 16]
    assert {read.scheme for read in packed} == {
        PackedInt(bits, 32, "asymmetric" not in name, padded=True, reordered=reordered)
        for bits in (3, 5, 6, 7)
    }
    assert not report.notes
    dense = dict(m for n, t in tensors_of(source).items() for m in matrices(n, t))
    for read in packed:
        module = read.stored["weight_packed"].name.rpartition(".")[0]
        (scheme,) = (scheme for target, scheme in groups.items() if belongs(module, target))
        order = order_of(dense[module], reordered)
        theirs = decompress(compress(dense[module][:, order], scheme), scheme)
        weight = model.get_submodule(read.site.name).weight
        found = (weight if read.part is None else weight.parts[read.part]).dense(torch.float32)
        assert torch.equal(found, theirs[:, order.argsort()].float()), module
    check_answers(folder, source, tmp_path)
