"""The compiled kernels against `dense` in float64, each instruction set that this machine has.

The bounds are proven, not measured: rounding an input to 8 bits of the largest of its 32 moves it
by at most a 254th of that; with `int16` by a 254th of this; with `float32` not at all. What a
scheme rounds its entries to (bfloat16, for example) the rounding modes do not repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from cabochon.errors import CabochonError
from cabochon.kernels.arena import Arena
from cabochon.kernels.choose import Kernels
from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import Activations, Library, library
from cabochon.kernels.packed import ACTIVATIONS, PackedWeight
from cabochon.nn.affine import AffineWeight
from cabochon.nn.bits import pack
from cabochon.nn.byte_codes import ByteWeight
from cabochon.nn.codebook import CodebookWeight, PlainScales
from cabochon.nn.float4 import Float4Weight
from cabochon.nn.minifloat import E4M3
from cabochon.nn.packed_int import PackedIntWeight
from cabochon.nn.weight import Coded, DenseWeight, Stack, StoredFloats, Weight

found = library()
pytestmark = pytest.mark.skipif(found is None, reason="no C++ compiler where it was installed")

ROUNDED = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NF4 = [-1, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1]


def integers(
    rows: int,
    columns: int,
    bits: int,
    group: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    symmetric: bool = True,
) -> PackedIntWeight:
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    codes[:2], codes[2:4] = 0, 2**bits - 1
    zeros = None if symmetric else torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8)
    if zeros is not None:  # rows of nothing but zeros have no bound to rounding what cancels
        zeros[:4] = 2 ** (bits - 1)
    scales = (torch.rand(rows, groups) * 0.02 + 0.001).to(dtype)
    words = pack(codes, bits)
    return PackedIntWeight(words, scales, zeros, in_features=columns, bits=bits, group=group)


def float4(rows: int, columns: int, block: int) -> Float4Weight:
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(0, 127, (rows, -(-columns // block)), dtype=torch.uint8)
    return Float4Weight(codes, scales, E4M3 * 0.001, in_features=columns, block=block)


def nf4(rows: int, columns: int, rounding: torch.dtype) -> CodebookWeight:
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    scales = PlainScales(torch.rand(rows * columns // 64))
    return CodebookWeight(codes, torch.tensor(NF4), scales, block=64, rounding=rounding)


def fp8(rows: int, columns: int, cell: tuple[int, int]) -> ByteWeight:
    codes = torch.randint(0, 127, (rows, columns), dtype=torch.uint8)
    codes += torch.randint(0, 2, codes.shape, dtype=torch.uint8) * 128
    scales = torch.rand(-(-rows // cell[0]), -(-columns // cell[1]))
    return ByteWeight(codes, scales, E4M3, cell=cell)


def octets(rows: int, columns: int, cell: tuple[int, int], *, symmetric: bool = False) -> Weight:
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scales = torch.rand(-(-rows // cell[0]), -(-columns // cell[1]))
    zeros = None if symmetric else torch.randint(-128, 128, scales.shape, dtype=torch.int8)
    return ByteWeight(codes, scales, zeros=zeros, cell=cell)


def affine(rows: int, columns: int, bits: int, dtype: torch.dtype) -> AffineWeight:
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)
    scales, biases = (torch.randn(rows, columns // 32).to(dtype) for _ in range(2))
    words = pack(codes, bits)
    return AffineWeight(words, scales, biases, in_features=columns, bits=bits, group=32)


CODED: dict[str, Callable[[], Weight]] = {
    "int4, blocks": lambda: integers(96, 256, 4, 32),
    "int4, odd": lambda: integers(37, 91, 4, 91, torch.float16),
    "int4, groups of 16, cut": lambda: integers(33, 104, 4, 16),
    "int4, groups of 48, cut": lambda: integers(50, 160, 4, 48, torch.float32),
    "int4, asymmetric": lambda: integers(65, 192, 4, 64, symmetric=False),
    "int4, asymmetric rows": lambda: integers(5, 33, 4, 33, symmetric=False),
    "int8": lambda: integers(64, 129, 8, 129),
    "int8, asymmetric": lambda: integers(47, 128, 8, 128, torch.float16, symmetric=False),
    "int8, groups of 16": lambda: integers(40, 128, 8, 16, symmetric=False),
    "int3, cut": lambda: integers(33, 100, 3, 64, symmetric=False),
    "int5, float16": lambda: integers(64, 128, 5, 128, torch.float16),
    "nvfp4": lambda: float4(70, 208, 16),
    "mxfp4": lambda: float4(35, 160, 32),
    "nf4": lambda: nf4(48, 192, torch.float32),
    "nf4, bfloat16": lambda: nf4(33, 128, torch.bfloat16),
    "int8 codes": lambda: octets(37, 60, (1, 60), symmetric=True),
    "int8 codes, asymmetric rows": lambda: octets(37, 60, (1, 60)),
    "int8 codes, asymmetric groups": lambda: octets(20, 96, (1, 32)),
    "int8 codes, asymmetric blocks, cut": lambda: octets(37, 128, (16, 64)),
    "int8 codes, all alike": lambda: octets(20, 64, (20, 64)),
}
for width in (2, 3, 4, 5, 6, 8):  # every width in every way to have scales
    for size in (16, 32, 160):
        for even in (True, False):
            CODED[f"{width} bits by {size}, {'' if even else 'a'}symmetric"] = partial(
                integers, 40, 160, width, size, symmetric=even
            )
    CODED[f"{width} bits, minima"] = partial(affine, 33, 128, width, torch.float32)
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda x: x,
    "heavy tails": lambda x: x * x.abs() ** 3,
    "zero": torch.zeros_like,
    "tiny": lambda x: x * 1e-33,
    "subnormal": lambda x: x * 1e-40,
    "large": lambda x: x * 1e30,
    "alike": lambda x: torch.full_like(x, -127.0),
}


def packed(kernels: Library, weight: Weight, activations: Activations) -> PackedWeight:
    coded = weight.description()
    assert isinstance(coded, Coded)
    shape = {"out_features": weight.out_features, "in_features": weight.in_features}
    return PackedWeight(kernels, coded, activations, arena=Arena(kernels), **shape)


def bound(weight: Weight, dense: Tensor, x: Tensor, activations: Activations) -> Tensor:
    """The most that a product may be off, `[n, out]` float64."""
    coded = weight.description()
    assert isinstance(coded, Coded)
    units = -(-x.shape[1] // 32)
    room = (0, units * 32 - x.shape[1])
    by_unit = torch.nn.functional.pad(x.abs(), room).view(len(x), units, 32).amax(-1)
    steps = {"int8": 1 / 254, "int16": 1 / 254**2, "float32": 0.0}[activations]
    moved = (by_unit * steps).repeat_interleave(32, dim=1)[:, : x.shape[1]]
    # Codes and zeros are multiplied apart: what they cancel counts for rounding in float32.
    span = 2**coded.bits if coded.values is None else 2
    large = dense.abs().amax(1, keepdim=True) * span
    entries = dense.abs() * (0.0 if activations == "float32" else ROUNDED[coded.rounded])
    if coded.values is not None:
        entries = entries + large / 127 / 254
    return moved @ dense.abs().T * 1.001 + x.abs() @ (entries + large * 1e-6).T + 1e-38


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("kind", CODED)
def test_products_are_within_bounds(kernels: Library, kind: str, activations: Activations) -> None:
    torch.manual_seed(0)
    weight = CODED[kind]()
    kernel = packed(kernels, weight, activations)
    dense = weight.dense(torch.float32).double()
    for name, change in INPUTS.items():
        for count in (1, 2, 3, 5, 8, 19) if name == "ordinary" else (2,):
            x = change(torch.randn(count, weight.in_features))
            error = (kernel.linear(x).double() - x.double() @ dense.T).abs()
            assert (error <= bound(weight, dense, x.double(), activations)).all(), (name, count)


@pytest.mark.parametrize("kind", CODED)
def test_dense_is_the_same_bit_for_bit(kernels: Library, kind: str) -> None:
    torch.manual_seed(1)
    weight = CODED[kind]()
    kernel = packed(kernels, weight, "int8")
    assert torch.equal(kernel.dense(torch.float32), weight.dense(torch.float32))
    assert torch.equal(kernel.dense(torch.bfloat16, 3, 5), weight.dense(torch.bfloat16, 3, 5))
    ids = torch.tensor([[4, 0], [weight.out_features - 1, 4]])
    assert torch.equal(kernel.rows(ids, torch.float32), weight.rows(ids, torch.float32))


def test_some_rows_are_those_of_all(kernels: Library) -> None:
    weight = integers(130, 64, 4, 32)
    kernel, x = packed(kernels, weight, "int8"), torch.randn(3, 64)
    everything = kernel.linear(x)
    for start, stop in ((0, 130), (5, 7), (31, 33), (60, 129), (128, 130)):
        assert torch.equal(kernel.linear(x, start, stop), everything[:, start:stop])


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none(
    kernels: Library, activations: Activations, bad: float
) -> None:
    kernel = packed(kernels, integers(40, 96, 4, 32), activations)
    x = torch.randn(2, 96)
    x[1, 50] = bad
    y = kernel.linear(x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("cell", [(1, 100), (40, 100), (16, 32)])
def test_stored_floats_are_multiplied_exactly(kernels: Library, cell: tuple[int, int]) -> None:
    torch.manual_seed(2)
    weights: list[Weight] = [fp8(40, 100, cell)]
    weights += [DenseWeight(torch.randn(41, 100).to(dtype)) for dtype in ROUNDED]
    for weight in weights:
        floats = weight.description()
        assert isinstance(floats, StoredFloats)
        kernel = FloatsWeight(kernels, weight, move=Arena(kernels))
        dense = weight.dense(torch.float32).double()
        for count in (1, 2, 3, 7, 17):
            x = torch.randn(count, 100)
            error = (kernel.linear(x).double() - x.double() @ dense.T).abs()
            assert (error <= x.abs().double() @ dense.abs().T * 1e-5).all()
        assert torch.equal(kernel.linear(x[:3], 7, 30), kernel.linear(x[:3])[:, 7:30])


def test_kernels_are_chosen_inside_of_other_weights_and_told() -> None:
    assert found is not None
    chooser = Kernels(found, "int8")
    experts = chooser.for_weight(Stack([integers(32, 64, 4, 32) for _ in range(3)]))
    assert isinstance(experts, Stack)
    assert sum(isinstance(part, PackedWeight) for part in experts.modules()) == 3
    plain = chooser.for_weight(integers(32, 64, 4, 8))
    assert isinstance(plain, PackedIntWeight)  # no kernel for groups of 8
    assert "3 of int4 by 32, activations int8" in chooser.describe()
    assert "1 of PyTorch" in chooser.describe()


def test_without_a_library_everything_is_computed_and_told() -> None:
    chooser = Kernels(None, "int8")
    weight = integers(32, 64, 4, 32)
    assert chooser.for_weight(weight) is weight
    assert "not built" in chooser.describe()


def test_an_instruction_set_that_is_missing_is_refused() -> None:
    assert found is not None
    with pytest.raises(CabochonError, match=r"'sse9', but this machine has .*scalar"):
        found.choose("sse9")
