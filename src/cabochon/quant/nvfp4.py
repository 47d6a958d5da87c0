"""NVFP4 weights, in the two layouts they come in, whose global scales are each other's reciprocals.

compressed-tensors stores `weight_global_scale = 448 * 6 / amax` and divides by it; ModelOpt stores
`weight_scale_2 = amax / (448 * 6)` and multiplies. Everything else is the same but for the names,
which tell them apart: confusing the two is a factor of millions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cabochon.quant.scheme import Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight

BLOCK = 16  # entries that share a scale


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """4-bit floats, two to a byte, in blocks of 16 with an 8-bit float each."""

    layout: Literal["compressed-tensors", "modelopt"]

    @property
    def name(self) -> str:
        return "nvfp4" if self.layout == "compressed-tensors" else "nvfp4 modelopt"

    @property
    def bits(self) -> int:
        return 4

    @property
    def slots(self) -> tuple[Slot, ...]:
        divides = self.layout == "compressed-tensors"
        codes = "weight_packed" if divides else "weight"
        whole = "weight_global_scale" if divides else "weight_scale_2"
        return (
            Slot(codes, frozenset({"U8"}), ("out", "in/2"), "codes"),
            Slot("weight_scale", frozenset({"F8_E4M3"}), ("out", f"in/{BLOCK}"), "scales"),
            Slot(whole, frozenset({"F32"}), (), "divisor" if divides else "factor"),
        )

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        import torch

        from cabochon.nn.float4 import Float4Weight
        from cabochon.nn.minifloat import E4M3

        codes, scales, whole = (stored[slot.leaf] for slot in self.slots)
        whole = whole.reshape(())
        levels = E4M3 / whole if self.layout == "compressed-tensors" else E4M3 * whole
        return Float4Weight(
            codes, scales.view(torch.uint8), levels, in_features=site.in_features, block=BLOCK
        )
