"""ModelOpt's own layouts: integers packed along the output, smoothing, and low-rank corrections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cabochon.quant.scheme import FLOATS, Scheme, Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight


@dataclass(frozen=True, slots=True)
class RowPairs:
    """4-bit integers, two's complement, two rows to a byte: AWQ as ModelOpt stores it.

    The even row is in the low half. With `rounded`, entries are rounded to 8-bit floats before they
    are used, by a scale of their own: W4A8.
    """

    group: int
    rounded: bool = False

    @property
    def name(self) -> str:
        return f"int4 g{self.group} by row pairs" + (" as fp8" if self.rounded else "")

    @property
    def bits(self) -> int:
        return 4

    @property
    def slots(self) -> tuple[Slot, ...]:
        slots = (
            Slot("weight", frozenset({"U8"}), ("out/2", "in"), "codes"),
            Slot("weight_scale", FLOATS, ("out", f"in/{self.group}"), "scales"),
        )
        whole = Slot("weight_scale_2", frozenset({"F32"}), (), "factor")
        return (*slots, whole) if self.rounded else slots

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        """The same codes and as many bits, packed along the input, as other producers have it."""
        import torch

        from cabochon.nn.bits import pack
        from cabochon.nn.packed_int import PackedIntWeight
        from cabochon.nn.smoothed import Float8Weight

        pairs = stored["weight"]
        codes = torch.stack((pairs & 15, pairs >> 4), dim=1).flatten(0, 1)[: site.out_features]
        weight = PackedIntWeight(
            pack(codes ^ 8, 4),  # from two's complement to codes whose 8 is zero
            stored["weight_scale"].float(),
            None,
            in_features=site.in_features,
            bits=4,
            group=self.group,
        )
        return (
            Float8Weight(weight, stored["weight_scale_2"].reshape(())) if self.rounded else weight
        )


@dataclass(frozen=True, slots=True)
class Smoothed:
    """A matrix whose activations are multiplied with a scale for each column, `pre_quant_scale`."""

    inner: Scheme

    @property
    def name(self) -> str:
        return f"{self.inner.name} smoothed"

    @property
    def bits(self) -> int:
        return self.inner.bits

    @property
    def slots(self) -> tuple[Slot, ...]:
        # in the model's own dtype, like a matrix
        return (*self.inner.slots, Slot("pre_quant_scale", FLOATS, ("in",), "matrix"))

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        from cabochon.nn.smoothed import SmoothedWeight

        return SmoothedWeight(self.inner.build(stored, site), stored["pre_quant_scale"])


@dataclass(frozen=True, slots=True)
class Corrected:
    """A matrix and one of low rank to be added: SVDQuant."""

    inner: Scheme
    rank: int

    @property
    def name(self) -> str:
        return f"{self.inner.name} + rank {self.rank}"

    @property
    def bits(self) -> int:
        return self.inner.bits

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (
            *self.inner.slots,
            Slot("svdquant_lora_a", FLOATS, (f"{self.rank}", "in"), "matrix"),
            Slot("svdquant_lora_b", FLOATS, ("out", f"{self.rank}"), "matrix"),
        )

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        from cabochon.nn.smoothed import CorrectedWeight

        inner = self.inner.build(stored, site)
        return CorrectedWeight(inner, stored["svdquant_lora_a"], stored["svdquant_lora_b"])
