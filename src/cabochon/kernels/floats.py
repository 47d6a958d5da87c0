"""`FloatsWeight`: a matrix of stored floats, multiplied without a copy in another dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from cabochon.kernels.arena import Arena
from cabochon.kernels.backlog import Backlog, at_once
from cabochon.kernels.library import Library, Rows, address, threads
from cabochon.kernels.search import Found
from cabochon.nn.softcap import SoftCap
from cabochon.nn.weight import StoredFloats, Weight

_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.uint8: 3}


class FloatsWeight(Weight):
    """`stored`, whose entries are floats; everything but products is left to it.

    What it is made of goes from its file into memory of the arena `move`, if it is to be moved, by
    `backlog` if there is one.
    """

    def __init__(
        self,
        library: Library,
        stored: Weight,
        *,
        move: Arena | None,
        backlog: Backlog | None = None,
    ) -> None:
        super().__init__(stored.out_features, stored.in_features)
        if move is not None:
            with at_once(library, backlog) as work:
                for name, buffer in list(stored.named_buffers(recurse=False)):
                    # Of all but the matrix, the description is made: that is needed at once.
                    matrix = buffer.numel() == self.out_features * self.in_features
                    moved = _moved(buffer, work, move) if matrix else buffer.clone()
                    setattr(stored, name, moved)
        floats = stored.description()
        assert isinstance(floats, StoredFloats)
        self.stored = stored
        self._library = library
        self.floats = floats  # keeps alive what the kernels look at
        self.matrix = Rows(
            data=address(floats.data),
            scales=address(floats.scales),
            rows=self.out_features,
            columns=self.in_features,
            type=_TYPES[floats.data.dtype],
            scale_rows=floats.scale_rows,
            scale_columns=floats.scale_columns or self.in_features,
        )

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self.stored.dense(dtype, start, stop)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.stored.rows(ids, dtype)

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.out_features if stop is None else stop
        flat = x.reshape(-1, self.in_features).float().contiguous()
        y = torch.empty(len(flat), stop - start)
        self._library.times_rows(
            self.matrix,
            None,
            address(flat),
            self.in_features,
            len(flat),
            start,
            stop,
            address(y),
            stop - start,
            threads(),
        )
        return y.to(x.dtype).view(*x.shape[:-1], stop - start)

    def shortlist(self, x: Tensor, cap: SoftCap) -> Found:
        return Found(self._library, self.linear(x.float()), x, cap)

    def among(self, x: Tensor, ids: Tensor) -> Tensor:
        count = ids.shape[1]
        flat, y = x.float().contiguous(), torch.empty(len(x), count)
        for one, own, products in zip(flat, ids.contiguous(), y, strict=True):
            self._library.times_rows(
                self.matrix,
                address(own),
                address(one),
                self.in_features,
                1,
                0,
                count,
                address(products),
                count,
                threads(),
            )
        return y.to(x.dtype)


def _moved(tensor: Tensor, work: Backlog, arena: Arena) -> Tensor:
    stored, room = tensor.contiguous(), arena.take(tensor.nbytes)
    if tensor.numel():
        # Not by torch: its threads would wait for more to do while others go on.
        work.copy(room, stored)
    return room.view(tensor.dtype).view(tensor.shape)
