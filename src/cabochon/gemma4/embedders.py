"""From towers, patches or frames to soft tokens of the text model's width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cabochon.config import PatchConfig
from cabochon.nn.linear import BiasedLinear, Linear
from cabochon.nn.norm import LayerNorm, RMSNorm


class SoftTokenEmbedder(nn.Module):
    """From a tower to the text model. The norm comes first; no loader could see it otherwise."""

    def __init__(self, tower_size: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.embedding_pre_projection_norm = RMSNorm(eps)
        self.embedding_projection = Linear(tower_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding_projection(self.embedding_pre_projection_norm(x))


class PatchEmbedder(nn.Module):
    """Vision without a tower: norms around one matrix, and a learned vector for column and row."""

    pos_embedding: Tensor  # [positions, 2, hidden_size]: x, then y

    def __init__(self, config: PatchConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_ln1 = LayerNorm(config.pixels)
        self.patch_dense = BiasedLinear(config.pixels, width)
        self.patch_ln2 = LayerNorm(width)
        table = torch.empty(config.position_table_size, 2, width)
        self.pos_embedding = nn.Parameter(table, requires_grad=False)
        self.pos_norm = LayerNorm(width)

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """`pixels [patches, 3 * side**2]` in 0 to 1, `positions [patches, 2]` as (x, y)."""
        x = self.patch_ln2(self.patch_dense(self.patch_ln1(pixels)))
        table = self.pos_embedding.to(x.dtype)
        x = x + table[positions[:, 0], 0] + table[positions[:, 1], 1]
        return self.pos_norm(x)
