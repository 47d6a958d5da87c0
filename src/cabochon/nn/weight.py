"""`Weight`: a matrix in its stored bits, and `DenseWeight`, the one that is stored as floats.

A weight has no dtype to ask for. Whoever wants numbers says in which dtype; products come back in
the dtype of the activation. This is what keeps a storage type from becoming a compute type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_BYTES = 8 << 20  # of a tile turned into the compute dtype, so that no dense copy ever exists


class Weight(nn.Module):
    """A matrix of logical shape `[out_features, in_features]`.

    `dense` is the definition. `linear` and `rows` agree with it exactly, up to the order of sums.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` in `dtype`: `[stop - start, in_features]`."""
        raise NotImplementedError

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `ids` (any shape) in `dtype`: `[*ids.shape, in_features]`."""
        raise NotImplementedError

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`x @ W[start:stop].T`: `[..., in_features]` to `[..., stop - start]`, in `x`'s dtype."""
        stop = self.out_features if stop is None else stop
        step = max(1, TILE_BYTES // (self.in_features * x.element_size()))
        if step >= stop - start:
            return F.linear(x, self.dense(x.dtype, start, stop))
        y = x.new_empty(*x.shape[:-1], stop - start)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            y[..., first - start : last - start] = F.linear(x, self.dense(x.dtype, first, last))
        return y


class DenseWeight(Weight):
    """A matrix stored as bfloat16, float16 or float32, and kept so."""

    def __init__(self, data: Tensor) -> None:
        super().__init__(*data.shape)
        self.register_buffer("data", data)

    data: Tensor  # [out_features, in_features]

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self.data[start:stop].to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.data[ids].to(dtype)


class Stack(Weight):
    """Matrices of equal size, one below the other: experts that are stored one by one."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        rows = parts[0].out_features
        assert all(part.out_features == rows for part in parts)
        super().__init__(rows * len(parts), parts[0].in_features)
        self.parts = nn.ModuleList(parts)
        self.part_rows = rows

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return torch.cat([p.dense(dtype, *rows) for p, rows in self._covering(start, stop)])

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return torch.cat([p.linear(x, *rows) for p, rows in self._covering(start, stop)], dim=-1)

    def _covering(self, start: int, stop: int | None) -> Iterator[tuple[Weight, tuple[int, int]]]:
        """The parts that hold rows `start` to `stop`, and which of their own rows these are."""
        stop = self.out_features if stop is None else stop
        for index in range(start // self.part_rows, -(-stop // self.part_rows)):
            first = index * self.part_rows
            part = self.parts[index]
            assert isinstance(part, Weight)
            yield part, (max(start - first, 0), min(stop - first, self.part_rows))
