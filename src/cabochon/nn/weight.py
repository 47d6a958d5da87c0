"""`Weight`: a matrix in its stored bits, and `DenseWeight`, the one that is stored as floats.

A weight has no dtype to ask for. Whoever wants numbers says in which dtype; products come back in the
dtype of the activation. This is what keeps a storage type from becoming a compute type.
"""

from __future__ import annotations

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
