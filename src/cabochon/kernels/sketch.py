"""`SketchedHead`: an LM head that finds the likeliest tokens in few of its bytes.

Beside the matrix there is a sketch of it in four bits an entry, which gives every product, and how
far off that may be. Only tokens that may then be among the likeliest are multiplied with the matrix
itself, few of them, so that what is drawn is what would have been drawn: but for a chance of one in
10^16 a draw, over the lot by which the sketch is drawn, for who has not made weights or inputs to
fit it. csrc/sketch.h says how.
"""

from __future__ import annotations

from ctypes import pointer
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cabochon.kernels.arena import ALIGNMENT, Arena
from cabochon.kernels.backlog import Backlog, at_once
from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import Library, Matrix, Sketch, address, threads
from cabochon.kernels.multiplied import Multiplied, linear
from cabochon.kernels.packed import FLOATS, ROWS, UNIT, UNIT_BYTES
from cabochon.kernels.search import Found, Nearly
from cabochon.nn.softcap import SoftCap
from cabochon.nn.weight import Coded, StoredFloats, Weight

GROUP, ZERO = 64, 8  # csrc/sketch.h
_U4 = 0  # csrc/api.h
LEAST = 1 << 24  # entries that are worth it
LEAST_BITS = 5  # of what is coded


def sketchable(weight: Weight, described: Coded | StoredFloats) -> bool:
    """Whether a head that is so described can have a sketch, and gains by it."""
    rows, columns = weight.out_features, weight.in_features
    if columns % GROUP or rows * columns < LEAST:
        return False
    if isinstance(described, StoredFloats):
        return described.scales is None and described.data.dtype in FLOATS
    # Rows are packed again from where they are stored. That must be a file that is mapped: what
    # was made of it would have to stay in memory.
    mapped = not described.octets.untyped_storage().resizable()
    return mapped and described.values is None and described.bits >= LEAST_BITS


class SketchedHead(Weight):
    """A sketch of `whole`, whose floats, or what it is packed from, stay where they are."""

    def __init__(
        self,
        library: Library,
        whole: Multiplied,
        *,
        arena: Arena,
        backlog: Backlog | None = None,
    ) -> None:
        super().__init__(whole.out_features, whole.in_features)
        self.whole = whole
        self._library = library
        stored, parts = _stored(whole)
        near = _matrix(whole)
        self.register_buffer("data", arena.take(-(-self.out_features // ROWS) * near.stride))
        self.register_buffer("dither", torch.rand(self.in_features, generator=_lot()))
        margins = arena.take(2 * 4 * self.out_features).view(torch.float32)
        self.register_buffer("margins", margins.view(-1, 2))
        near.data = address(self.data)
        self.sketch = Sketch(
            near=near,
            dither=address(self.dither),
            margins=address(self.margins),
            whole=linear(whole),
            stored=stored,
        )
        with at_once(library, backlog) as work:
            work.sketch(self.sketch, (self.data, self.margins, self.dither), parts)

    data: Tensor  # uint8 [bytes]
    dither: Tensor  # [in_features], from 0 up to 1
    margins: Tensor  # [out_features, 2]: of norms of an input, and of its largest group

    @property
    def nbytes(self) -> int:
        """Of the sketch as products read it."""
        return self.data.nbytes

    @cached_property
    def widest(self) -> tuple[float, float]:
        """The largest margins."""
        norm, group = self.margins.amax(dim=0).tolist()
        return norm, group

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self.whole.dense(dtype, start, stop)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.whole.rows(ids, dtype)

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return self.whole.linear(x, start, stop)

    def among(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.whole.among(x, ids)

    def shortlist(self, x: Tensor, cap: SoftCap) -> Found:
        nearly = Nearly(self.sketch, self.widest, self)
        return Found(self._library, self._near(x), x, cap, nearly)

    def nearly(self, x: Tensor) -> Tensor:
        return self._near(x).to(x.dtype)

    def _near(self, x: Tensor) -> Tensor:
        """Float32 `[n, out_features]` of `x [n, in_features]`."""
        x = x.float().contiguous()
        y = torch.empty(len(x), self.out_features)
        self._library.near(
            self.sketch,
            address(x),
            self.in_features,
            len(x),
            address(y),
            self.out_features,
            threads(),
        )
        return y


def _lot() -> torch.Generator:
    """The same every time, so that a sketch is."""
    return torch.Generator().manual_seed(2026)


def _stored(whole: Multiplied) -> tuple[Any, tuple[Tensor, ...]]:
    """A pointer to what `whole` is packed from, if it is, and what is read of the whole."""
    if isinstance(whole, FloatsWeight):
        return None, (whole.floats.data,)
    assert whole.source is not None
    return pointer(whole.source.stored), whole.source.parts


def _matrix(whole: Multiplied) -> Matrix:
    """Codes of four bits with a bfloat16 for each group; its memory is still missing."""
    units, groups = whole.in_features // UNIT, whole.in_features // GROUP
    codes_at = -(-groups * ROWS * 2 // ALIGNMENT) * ALIGNMENT
    return Matrix(
        rows=whole.out_features,
        columns=whole.in_features,
        units=units,
        groups=groups,
        halves=GROUP // 16,
        per_shared=1,
        digits=2 if isinstance(whole, FloatsWeight) else whole.matrix.digits,
        scales=FLOATS[torch.bfloat16],
        zero=ZERO,
        gain=1.0,
        codes_at=codes_at,
        stride=codes_at + units * UNIT_BYTES[_U4],
    )
