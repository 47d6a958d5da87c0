"""A `Scheme` says which tensors make up a matrix, how their axes follow from it, and what to build.

Shape checks, byte counts and error texts all follow from the slots that a scheme declares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from cabochon.checkpoint.headers import TensorMeta

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight

FLOATS = frozenset({"BF16", "F16", "F32"})

# A divisor or a factor is one number for the whole matrix.
Holds = Literal["matrix", "codes", "scales", "shape", "divisor", "factor"]


@dataclass(frozen=True, slots=True)
class Site:
    """A matrix that the model needs, by its canonical name."""

    name: str
    kind: Literal["linear", "embedding", "experts"]
    out_features: int  # rows; of an embedding, its entries
    in_features: int
    parts: int = 1  # equal slices of rows which a file may store one by one

    @property
    def part(self) -> Site:
        """One of the parts, as a matrix of its own."""
        return replace(self, out_features=self.out_features // self.parts, parts=1)

    def extent(self, axis: str) -> int:
        """The size of an axis: "out", "in", "in/32" (groups, the last may be cut), or a number."""
        name, _, group = axis.partition("/")
        if name.isdecimal():
            return int(name)
        size = {"out": self.out_features, "in": self.in_features}[name]
        return -(-size // int(group or 1))


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a scheme: its leaf name, the dtypes it may have, its axes, and what it holds."""

    leaf: str
    dtypes: frozenset[str]
    axes: tuple[str, ...]
    holds: Holds


class Scheme(Protocol):
    """How a matrix is stored."""

    @property
    def name(self) -> str:
        """As reports print it: "int4 g32"."""
        ...

    @property
    def bits(self) -> int: ...

    @property
    def slots(self) -> tuple[Slot, ...]: ...

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        """The weight made of `stored`, whose leaves, dtypes and shapes are those of the slots."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """The matrix itself, in a float dtype."""

    dtype: str

    @property
    def name(self) -> str:
        return self.dtype.lower()

    @property
    def bits(self) -> int:
        return 32 if self.dtype == "F32" else 16

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot("weight", frozenset({self.dtype}), ("out", "in"), "matrix"),)

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        from cabochon.nn.weight import DenseWeight

        return DenseWeight(stored["weight"])


@dataclass(frozen=True, slots=True)
class PackedInt:
    """compressed-tensors' `pack-quantized` (0.20): integers in int32 words along the input.

    Zero points are packed along the output. For 4 and 8 bits all versions of the format agree.
    """

    bits: int
    group: int | None  # None: one scale a row ("channel")
    symmetric: bool

    @property
    def name(self) -> str:
        grouping = "channel" if self.group is None else f"g{self.group}"
        return f"int{self.bits} {grouping}" + ("" if self.symmetric else " asymmetric")

    @property
    def slots(self) -> tuple[Slot, ...]:
        words = 32 // self.bits  # entries a word; 4 and 8 bits never straddle two
        groups = "1" if self.group is None else f"in/{self.group}"
        required = (
            Slot("weight_packed", frozenset({"I32"}), ("out", f"in/{words}"), "codes"),
            Slot("weight_scale", FLOATS, ("out", groups), "scales"),
            Slot("weight_shape", frozenset({"I64"}), ("2",), "shape"),
        )
        if self.symmetric:
            return required
        zeros = Slot("weight_zero_point", frozenset({"I32"}), (f"out/{words}", groups), "codes")
        return (*required, zeros)

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        from cabochon.nn.packed_int import PackedIntWeight, unpack_columns

        zeros = None
        if not self.symmetric:
            zeros = unpack_columns(stored["weight_zero_point"], self.bits, site.out_features)
        return PackedIntWeight(
            stored["weight_packed"],
            stored["weight_scale"],
            zeros,
            in_features=site.in_features,
            bits=self.bits,
            group=self.group or site.in_features,
        )


class Difference(NamedTuple):
    """One thing that keeps stored tensors from fitting a scheme."""

    kind: Literal["MISSING", "DTYPE", "SHAPE", "UNUSED"]
    text: str


def differences(
    scheme: Scheme, stored: Mapping[str, TensorMeta], site: Site
) -> tuple[Difference, ...]:
    """What keeps `stored` (leaf to tensor) from being `site` in `scheme`; empty if nothing does."""
    known = {slot.leaf for slot in scheme.slots}
    found = [
        Difference("UNUSED", f"{leaf} is not part of {scheme.name}")
        for leaf in sorted(set(stored) - known)
    ]
    for slot in scheme.slots:
        difference = _difference(slot, stored.get(slot.leaf), site)
        if difference is not None:
            found.append(difference)
    return tuple(found)


def _difference(slot: Slot, meta: TensorMeta | None, site: Site) -> Difference | None:
    if meta is None:
        return Difference("MISSING", f"{slot.leaf} is missing")
    if meta.dtype not in slot.dtypes:
        expected = " or ".join(sorted(slot.dtypes))
        return Difference("DTYPE", f"{slot.leaf} is {meta.dtype}, expected {expected}")
    shape = [site.extent(axis) for axis in slot.axes]
    if list(meta.shape) != shape and not _equivalent(slot, meta, site):
        axes = ", ".join(slot.axes)
        found = f"{slot.leaf} has shape {list(meta.shape)}, expected [{axes}] = {shape}"
        return Difference("SHAPE", found)
    return None


def _equivalent(slot: Slot, meta: TensorMeta, site: Site) -> bool:
    """One number may be stored as a list of one, the shape of stacked experts with their count."""
    if slot.holds == "shape":
        return site.kind == "experts" and meta.shape == (3,)
    return not slot.axes and meta.shape == (1,)
