"""`SketchedHead`: an LM head of stored floats that finds the likeliest tokens in 2/5 of the bytes.

Beside the floats there is a sketch of them in six bits an entry. It gives every product, and how
far off that is at most: by Cauchy and Schwarz, the norm of the input times that of what the sketch
left of a row. Only tokens that by this bound may be among the likeliest are multiplied with the
floats themselves, few of them, so that what is drawn is exactly what would have been drawn.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from cabochon.kernels.arena import Arena
from cabochon.kernels.backlog import Backlog
from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import Library, Margin, address
from cabochon.kernels.packed import PackedWeight
from cabochon.kernels.search import Found, Nearly
from cabochon.nn.layout import Layout
from cabochon.nn.softcap import SoftCap
from cabochon.nn.weight import Coded, StoredFloats, Weight

GROUP, BITS = 64, 6  # csrc/sketch.h
LEAST = 1 << 24  # entries that are worth it

# Inputs are rounded twice to eight bits of the largest of 32: their norm changes by no more than
# sqrt(32) / 254**2 of it, 8.8e-5. The rest is for sums in float32.
_ROUNDING = 1e-4
_SLACK = 1.0001
_LOST = 1e-16  # norms of rows whose squares are too small for float32


def sketchable(described: StoredFloats) -> bool:
    """Whether a head of these floats can have a sketch, and gains by it."""
    data = described.data
    plain = described.scales is None and data.dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
    )
    return plain and data.shape[1] % GROUP == 0 and data.numel() >= LEAST


class SketchedHead(FloatsWeight):
    """The floats stay where they are, in their file if it is mapped."""

    def __init__(
        self,
        library: Library,
        stored: Weight,
        *,
        arena: Arena,
        backlog: Backlog | None = None,
    ) -> None:
        super().__init__(library, stored, move=None)
        rows, columns = self.out_features, self.in_features
        self.register_buffer("margins", arena.take(4 * rows).view(torch.float32))
        margin = Margin(address(self.margins), _SLACK, _ROUNDING, _LOST)
        coded = Coded(
            octets=torch.empty(rows, columns * BITS // 8, dtype=torch.uint8, device="meta"),
            layout=Layout.stream(BITS),
            group=GROUP,
            scales=torch.empty(rows, columns // GROUP, dtype=torch.bfloat16, device="meta"),
            zero=1 << (BITS - 1),
        )
        self.sketch = PackedWeight(
            library,
            coded,
            "int16",
            out_features=rows,
            in_features=columns,
            arena=arena,
            backlog=backlog,
            fill=lambda work, to: work.sketch(
                self.matrix, to.matrix, margin, to.data, self.margins
            ),
        )

    margins: Tensor  # [out_features], of products with an input of norm 1

    @cached_property
    def widest(self) -> float:
        """The largest margin."""
        return float(self.margins.max())

    def shortlist(self, x: Tensor, cap: SoftCap) -> Found:
        nearly = Nearly(self.margins, self.widest, _SLACK, self.matrix)
        return Found(self._library, self.sketch.linear(x.float()), x, cap, nearly)

    def nearly(self, x: Tensor) -> Tensor:
        return self.sketch.linear(x)
