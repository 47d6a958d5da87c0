"""Rounding of activations, as recipes claim it and files store its scales.

`Rounded` is an `Activations` for any producer: what differs between them are the names of leaves,
and whether a scale that covers all blocks divides or multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cabochon.quant.scheme import FLOATS, Slot

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cabochon.nn.weight import Weight

Numbers = Literal["int4", "int8", "fp4", "fp8"]  # fp4: E2M1; fp8: E4M3
Scales = Literal["float", "e4m3", "e8m0"]

_F32 = frozenset({"F32"})

# What calibration leaves behind. A recipe that rounds no activations has no use for it.
ACTIVATION_LEAVES = frozenset(
    {
        "input_scale",
        "activation_scale",
        "input_zero_point",
        "input_global_scale",
        "output_scale",
        "output_zero_point",
        "input_activation_scale",
        "output_activation_scale",
    }
)


@dataclass(frozen=True, slots=True)
class Static:
    """One scale for all activations, stored."""

    numbers: Numbers
    scale: str  # its leaf
    zero: str | None = None  # the leaf of the number that stands for zero; None: zero does
    asked: bool = False  # computed in the activations' dtype, to which the scale is rounded
    may_lack: bool = False  # a scale of 0.0 says that none was found: these stay as they are

    @property
    def name(self) -> str:
        return f"{self.numbers} static" + ("" if self.zero is None else " asymmetric")

    @property
    def slots(self) -> tuple[Slot, ...]:
        scale = Slot(self.scale, FLOATS, (), "scale or none" if self.may_lack else "scale")
        if self.zero is None:
            return (scale,)
        return scale, Slot(self.zero, frozenset({"I8"}), (), "codes")

    def rounding(self, stored: Mapping[str, Tensor]) -> nn.Module | None:
        from cabochon.nn.activations import StaticRounding

        scale = stored[self.scale].reshape(1)
        if self.may_lack and not scale:
            return None
        zero = None if self.zero is None else stored[self.zero].reshape(1)
        return StaticRounding(self.numbers, scale, zero, asked=self.asked)


@dataclass(frozen=True, slots=True)
class Largest:
    """ModelOpt's FP8: everything in proportion to the largest entry, in arithmetic of its own."""

    scale: str | None  # the leaf of a 448th of the largest; None: each token has its own largest

    @property
    def name(self) -> str:
        return "fp8 per token" if self.scale is None else "fp8 static"

    @property
    def slots(self) -> tuple[Slot, ...]:
        return () if self.scale is None else (Slot(self.scale, FLOATS, (), "scale"),)

    def rounding(self, stored: Mapping[str, Tensor]) -> nn.Module:
        from cabochon.nn.activations import LargestRounding

        scale = None if self.scale is None else stored[self.scale].reshape(1).float()
        return LargestRounding(scale)


@dataclass(frozen=True, slots=True)
class Dynamic:
    """Scales that are made while the model runs: of a token's entries, or of groups of them."""

    numbers: Numbers
    group: int | None = None  # None: all entries of a token share a scale
    symmetric: bool = True
    scales: Scales = "float"  # what they are rounded to themselves
    whole: str | None = None  # the leaf of what they are multiplied with first, and divided by
    reciprocal: bool = False  # the other way round, in ModelOpt's arithmetic
    multiplied: bool = False  # with a scale's reciprocal, as torchao does, instead of divided by it

    @property
    def name(self) -> str:
        sharing = "per token" if self.group is None else f"g{self.group}"
        scales = "" if self.scales == "float" else f" {self.scales}"
        return f"{self.numbers} {sharing}{scales}" + ("" if self.symmetric else " asymmetric")

    @property
    def slots(self) -> tuple[Slot, ...]:
        return () if self.whole is None else (Slot(self.whole, _F32, (), "scale"),)

    def rounding(self, stored: Mapping[str, Tensor]) -> nn.Module:
        from cabochon.nn.activations import DynamicRounding

        return DynamicRounding(
            self.numbers,
            self.group,
            symmetric=self.symmetric,
            scales=self.scales,
            whole=None if self.whole is None else stored[self.whole].reshape(1),
            reciprocal=self.reciprocal,
            multiplied=self.multiplied,
        )


@dataclass(frozen=True, slots=True)
class Rounded:
    """What goes into a matrix is rounded, or what comes out, or both."""

    inputs: Static | Largest | Dynamic | None
    outputs: Static | None = None

    @property
    def name(self) -> str:
        inputs = "as they are" if self.inputs is None else self.inputs.name
        return inputs if self.outputs is None else f"{inputs}, outputs {self.outputs.name}"

    @property
    def slots(self) -> tuple[Slot, ...]:
        ends = (end for end in (self.inputs, self.outputs) if end is not None)
        return tuple(slot for end in ends for slot in end.slots)

    def around(self, weight: Weight, stored: Mapping[str, Tensor]) -> Weight:
        from cabochon.nn.activations import RoundedWeight
        from cabochon.nn.smoothed import innermost

        inputs = None if self.inputs is None else self.inputs.rounding(stored)
        outputs = None if self.outputs is None else self.outputs.rounding(stored)
        return innermost(weight, lambda inner: RoundedWeight(inner, inputs, outputs))
