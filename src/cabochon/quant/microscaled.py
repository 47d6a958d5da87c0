"""OCP's microscaling formats, as compressed-tensors stores them: a power of two for 32 entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cabochon.quant.scheme import Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight

BLOCK = 32

_SCALES = Slot("weight_scale", frozenset({"U8"}), ("out", f"in/{BLOCK}"), "scales")


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """`mxfp4-pack-quantized`: 4-bit floats (E2M1), two to a byte."""

    @property
    def name(self) -> str:
        return "mxfp4"

    @property
    def bits(self) -> int:
        return 4

    @property
    def slots(self) -> tuple[Slot, ...]:
        return Slot("weight_packed", frozenset({"U8"}), ("out", "in/2"), "codes"), _SCALES

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        from cabochon.nn.float4 import Float4Weight
        from cabochon.nn.minifloat import E8M0

        codes, scales = (stored[slot.leaf] for slot in self.slots)
        return Float4Weight(codes, scales, E8M0, in_features=site.in_features, block=BLOCK)
