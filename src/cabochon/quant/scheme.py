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
INTEGERS = frozenset({"I32", "I64"})

# Scales of bytes are exponents of two, E8M0. A divisor or a factor is one number for the whole
# matrix; a table is looked up by codes; groups say which scales a column belongs to. A scale is one
# of activations, a single number, and may be 0.0 where that says that there is none.
Holds = Literal[
    "matrix", "codes", "scales", "float8 scales", "shape", "divisor", "factor", "table", "header",
    "groups", "scale", "scale or none", "blocks",
]  # fmt: skip


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
        """The size of an axis: "out", "in*3/32" (the last may be cut), "out*in/2", or a number.

        "in^64" is the width filled up to a multiple of 64.
        """
        factors, _, divisor = axis.partition("/")
        sizes = {"out": self.out_features, "in": self.in_features}
        size = 1
        for factor in factors.split("*"):
            name, _, multiple = factor.partition("^")
            whole = sizes.get(name) or int(name)
            size *= whole + -whole % int(multiple or 1)
        return -(-size // int(divisor or 1))


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a scheme: its leaf name, the dtypes it may have, its axes, and what it holds.

    Axes are named after those of the matrix, in the order they are stored; None: any shape.
    Without an optional tensor the others mean the same as with one that says nothing new.
    """

    leaf: str
    dtypes: frozenset[str]
    axes: tuple[str, ...] | None
    holds: Holds
    optional: bool = False


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


class Activations(Protocol):
    """How a recipe rounds what goes into a matrix, or comes out, while the model runs.

    It is claimed, never seen in a matrix: a file may store no more than a number, or nothing.
    """

    @property
    def name(self) -> str:
        """As reports print it: "int8 per token"."""
        ...

    @property
    def slots(self) -> tuple[Slot, ...]: ...

    def around(self, weight: Weight, stored: Mapping[str, Tensor]) -> Weight:
        """`weight`, whose products follow the recipe."""
        ...


class Difference(NamedTuple):
    """One thing that keeps stored tensors from fitting a scheme."""

    kind: Literal["MISSING", "DTYPE", "SHAPE", "UNUSED"]
    text: str


def differences(
    scheme: Scheme,
    stored: Mapping[str, TensorMeta],
    site: Site,
    activations: Activations | None = None,
) -> tuple[Difference, ...]:
    """What keeps `stored` (leaf to tensor) from being `site` in `scheme`; empty if nothing does."""
    slots = (*scheme.slots, *(activations.slots if activations else ()))
    known = {slot.leaf for slot in slots}
    found = [
        Difference("UNUSED", f"{leaf} is not part of {scheme.name}")
        for leaf in sorted(set(stored) - known)
    ]
    for slot in slots:
        difference = _difference(slot, stored.get(slot.leaf), site)
        if difference is not None:
            found.append(difference)
    return tuple(found)


def _difference(slot: Slot, meta: TensorMeta | None, site: Site) -> Difference | None:
    if meta is None:
        return None if slot.optional else Difference("MISSING", f"{slot.leaf} is missing")
    if meta.dtype not in slot.dtypes:
        expected = " or ".join(sorted(slot.dtypes))
        return Difference("DTYPE", f"{slot.leaf} is {meta.dtype}, expected {expected}")
    if slot.axes is None:
        return None
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
