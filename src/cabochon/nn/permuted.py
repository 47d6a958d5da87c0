"""`Permuted`: a matrix whose columns are stored in another order, that of their groups.

Quantizers that take columns by importance (`desc_act`, `actorder`) write down the group of each
column. Stored group by group, such a matrix is one like any other, whose activations are reordered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cabochon.nn.weight import Weight


class Permuted(Weight):
    """Columns of `weight` in another order.

    Args:
        weight: the matrix as it is stored.
        order: int64 `[in]`; column i of `weight` is column `order[i]` of this matrix.
    """

    def __init__(self, weight: Weight, order: Tensor) -> None:
        assert order.shape == (weight.in_features,)
        super().__init__(weight.out_features, weight.in_features)
        self.weight = weight
        self.register_buffer("order", order)
        self.register_buffer("place", order.argsort())

    order: Tensor
    place: Tensor  # column i of this matrix is column `place[i]` of the stored one

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self.weight.dense(dtype, start, stop)[:, self.place]

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.weight.rows(ids, dtype)[..., self.place]

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return self.weight.linear(x[..., self.order], start, stop)
