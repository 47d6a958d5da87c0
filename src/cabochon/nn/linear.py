"""The two modules that hold a matrix. Both get their `Weight` from the loader, never from `__init__`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cabochon.nn.weight import Weight


class Linear(nn.Module):
    """`x @ W.T`, no bias."""

    weight: Weight

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_module("weight", None)

    def forward(self, x: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        return self.weight.linear(x)


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
        # The reference rounds the scale to the compute dtype first: 39.25 for sqrt(1536) in bfloat16.
        scale = torch.tensor(self.scale, dtype=dtype, device=ids.device)
        return self.weight.rows(ids, dtype) * scale
