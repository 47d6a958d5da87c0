"""The modules that hold a matrix. Their `Weight` comes from the loader, never from `__init__`."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from cabochon.nn.weight import Weight


class Linear(nn.Module):
    """`x @ W.T`."""

    weight: Weight

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_module("weight", None)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        return self.weight.linear(x)

    def part(self, x: Tensor, index: int, parts: int) -> Tensor:
        """The product with one of `parts` equal slices of rows; nothing else is read."""
        rows = self.out_features // parts
        return self.weight.linear(x, index * rows, (index + 1) * rows)


class BiasedLinear(Linear):
    """`x @ W.T + b`."""

    bias: Tensor  # [out_features]

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.linear(x) + self.bias.to(x.dtype)


class Embedding(nn.Module):
    """Rows of a table, multiplied by a constant."""

    weight: Weight

    def __init__(self, num_embeddings: int, embedding_dim: int, scale: float) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.scale = scale
        self.register_module("weight", None)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:  # [n] -> [n, embedding_dim]
        return self.weight.rows(ids, dtype) * _rounded(self.scale, dtype)


@cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    """As the reference rounds a scale first: the root of 1536 is 39.25 in bfloat16."""
    return float(torch.tensor(scale, dtype=dtype))
