"""compressed-tensors' `pack-quantized`: integers in int32 words along the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cabochon.errors import LoadError
from cabochon.quant.scheme import FLOATS, INTEGERS, Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight

ALIGNED = (2, 4, 8)  # bits that fill a word whole, so that all versions pack them alike

_I32 = frozenset({"I32"})


@dataclass(frozen=True, slots=True)
class PackedInt:
    """Integers of 2 to 8 bits; zero points are packed in the same way, but along the output.

    Words are one stream of bits, or, as older versions wrote 3, 5, 6 and 7 bits, `padded`: each
    holds as many whole entries as go into it.
    """

    bits: int
    group: int | None  # None: one scale a row ("channel")
    symmetric: bool
    padded: bool = False
    reordered: bool = False  # a tensor says which group each column is in (actorder "group")

    @property
    def name(self) -> str:
        parts = [f"int{self.bits}", "channel" if self.group is None else f"g{self.group}"]
        parts += [] if self.symmetric else ["asymmetric"]
        parts += ["padded"] if self.padded else []
        parts += ["reordered"] if self.reordered else []
        return " ".join(parts)

    @property
    def width(self) -> str:
        """Words of a row."""
        return self._words("in")

    def _words(self, axis: str) -> str:
        return f"{axis}/{32 // self.bits}" if self.padded else f"{axis}*{self.bits}/32"

    @property
    def slots(self) -> tuple[Slot, ...]:
        groups = "1" if self.group is None else f"in/{self.group}"
        slots = [
            Slot("weight_packed", _I32, ("out", self.width), "codes"),
            Slot("weight_scale", FLOATS, ("out", groups), "scales"),
            Slot("weight_shape", INTEGERS, ("2",), "shape"),
        ]
        if not self.symmetric:
            slots.append(Slot("weight_zero_point", _I32, (self._words("out"), groups), "codes"))
        if self.reordered:
            slots.append(Slot("weight_g_idx", _I32, ("in",), "groups"))
        return tuple(slots)

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        from cabochon.nn.packed_int import PackedIntWeight, unpack_columns
        from cabochon.nn.permuted import Permuted

        words, zeros = stored["weight_packed"], stored.get("weight_zero_point")
        if self.padded:
            words = self._dense(words, site.in_features)
            zeros = None if zeros is None else self._dense(zeros.T, site.out_features).T
        if zeros is not None:
            zeros = unpack_columns(zeros, self.bits, site.out_features)
        order = self._order(stored, site)
        if order is not None:
            words = self._taken(words, order)
        weight = PackedIntWeight(
            words,
            stored["weight_scale"],
            zeros,
            in_features=site.in_features,
            bits=self.bits,
            group=self.group or site.in_features,
        )
        return weight if order is None else Permuted(weight, order)

    def _dense(self, words: Tensor, entries: int) -> Tensor:
        """Words that hold whole entries only, as one stream of bits."""
        import torch

        from cabochon.nn.bits import pack

        shifts = torch.arange(0, 33 - self.bits, self.bits, dtype=torch.int32)
        codes = words[:, :, None] >> shifts & (1 << self.bits) - 1
        return pack(codes.flatten(1)[:, :entries].to(torch.uint8), self.bits)

    def _order(self, stored: Mapping[str, Tensor], site: Site) -> Tensor | None:
        """Columns by their groups; None if they are so already."""
        if not self.reordered or bool((stored["weight_g_idx"] < 0).any()):
            return None  # -1, as upstream initializes it: not reordered
        groups, size = stored["weight_g_idx"], self.group or site.in_features
        counts = groups.bincount()
        if len(counts) * size != site.in_features or bool((counts != size).any()):
            raise LoadError(
                f"{site.name}.weight_g_idx does not put {size} columns into each of"
                f" {site.in_features // size} groups; the checkpoint is damaged"
            )
        return None if bool((groups.diff() >= 0).all()) else groups.argsort(stable=True)

    def _taken(self, words: Tensor, order: Tensor) -> Tensor:
        """`words` with their columns in another order."""
        import torch

        from cabochon.nn.bits import pack, unpack

        codes = unpack(words.contiguous().view(torch.uint8), self.bits, len(order))
        return pack(codes[:, order], self.bits)
