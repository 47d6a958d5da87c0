"""`Kept`: the keys or the values that a layer keeps, as floats or in eight bits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_LEAST = 1e-30  # a vector that has nothing larger is kept as zeros


class Kept:
    """Vectors `[slots, heads, head_dim]`, of which a slot is one token's.

    In int8 each head's vector counts multiples of a scale of its own, a 127th of its largest
    entry, so that no entry is off by more than half of that.
    """

    def __init__(
        self, slots: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.data = torch.empty(slots, heads, head_dim, dtype=dtype, device=device)
        self.scales: Tensor | None = None  # float32 [slots, heads]
        if dtype is torch.int8:
            self.scales = torch.empty(slots, heads, device=device)

    def write(self, slots: Tensor, made: Tensor) -> None:
        """Keep `made [n, heads, head_dim]` in `slots [n]`."""
        if self.scales is not None:
            made = made.float()
            largest = made.abs().amax(-1)
            by = torch.where(largest > _LEAST, 127 / largest, 0)
            self.scales.index_copy_(0, slots, largest / 127)
            made = (made * by[..., None]).round()
        self.data.index_copy_(0, slots, made.to(self.data.dtype))

    def copy(self, source: int, target: int, count: int) -> None:
        """Keep what `count` slots from `source` on hold in those from `target` on, too."""
        for part in (self.data, self.scales):
            if part is not None:
                part[target : target + count] = part[source : source + count]

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """What `slots [n]` hold: `[n, heads, head_dim]`."""
        found = self.data[slots].to(dtype)
        return found if self.scales is None else found * self.scales[slots].to(dtype)[..., None]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Store:
    """What all layers that make keys and values keep of them, by layer; it stays where it is.

    Layers of a group write and see the same slots.
    """

    keys: dict[int, Kept] = field(default_factory=dict)
    values: dict[int, Kept] = field(default_factory=dict)
    group_of: dict[int, int] = field(default_factory=dict)
