"""compressed-tensors' `pack-quantized`: integers in int32 words along the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cabochon.quant.scheme import FLOATS, Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight


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
