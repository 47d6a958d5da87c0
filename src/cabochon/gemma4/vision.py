"""The vision tower: patches of one picture to soft tokens of the text model's width.

One picture at a time and without padding: what upstream masks out does not exist here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cabochon.config import VisionConfig
from cabochon.nn.attention import attention
from cabochon.nn.clippable import ClippableLinear
from cabochon.nn.linear import Linear
from cabochon.nn.norm import RMSNorm
from cabochon.nn.rotary import Rotation, rotate_halves, vision_rotation


class PatchEmbedder(nn.Module):
    """Pixels to vectors, plus one learned vector for the column and one for the row."""

    position_embedding_table: Tensor  # [2, positions, hidden_size]: x, then y

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.input_proj = Linear(3 * config.patch_size**2, hidden)
        table = torch.empty(2, config.position_table_size, hidden)
        self.position_embedding_table = nn.Parameter(table, requires_grad=False)

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """`pixels [patches, 3 * patch_size**2]` in 0 to 1, `positions [patches, 2]` as (x, y)."""
        columns, rows = self.position_embedding_table
        placed = (columns[positions[:, 0]] + rows[positions[:, 1]]).to(pixels.dtype)
        return self.input_proj(2 * (pixels - 0.5)) + placed


class VisionAttention(nn.Module):
    """Every patch sees every patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, width = config.hidden_size, config.num_heads * config.head_dim
        self.q_proj = ClippableLinear(hidden, width, config.clipped)
        self.k_proj = ClippableLinear(hidden, width, config.clipped)
        self.v_proj = ClippableLinear(hidden, width, config.clipped)
        self.o_proj = ClippableLinear(width, hidden, config.clipped)
        self.q_norm = RMSNorm(config.eps, config.head_dim)
        self.k_norm = RMSNorm(config.eps, config.head_dim)
        self.v_norm = RMSNorm(config.eps)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        heads = (-1, self.head_dim)
        queries = rotate_halves(self.q_norm(self.q_proj(x).unflatten(-1, heads)), rotation)
        keys = rotate_halves(self.k_norm(self.k_proj(x).unflatten(-1, heads)), rotation)
        values = self.v_norm(self.v_proj(x).unflatten(-1, heads))
        return self.o_proj(attention(queries, keys, values, mask=None).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate_proj = ClippableLinear(hidden, width, config.clipped)
        self.up_proj = ClippableLinear(hidden, width, config.clipped)
        self.down_proj = ClippableLinear(width, hidden, config.clipped)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.eps, config.hidden_size)
        self.self_attn = VisionAttention(config)
        self.post_attention_layernorm = RMSNorm(config.eps, config.hidden_size)
        self.pre_feedforward_layernorm = RMSNorm(config.eps, config.hidden_size)
        self.mlp = VisionMLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.eps, config.hidden_size)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotation))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        config = self.config
        rotation = vision_rotation(positions, config.head_dim, config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation)
        return x


class VisionPooler(nn.Module):
    """Mean over squares of `pooling` by `pooling` patches, times the root of the width; float32."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.scale = config.hidden_size**0.5

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:  # [patches, h] -> [soft tokens, h]
        squares = positions // self.pooling
        columns = int(squares[:, 0].max()) + 1
        index = squares[:, 0] + columns * squares[:, 1]
        pooled = x.new_zeros(len(x) // self.pooling**2, x.shape[-1], dtype=torch.float32)
        pooled.index_add_(0, index, x.float())
        return pooled / self.pooling**2 * self.scale


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        self.pooler = VisionPooler(config)
        self.standardize = config.standardize
        if config.standardize:
            self.register_buffer("std_bias", torch.empty(config.hidden_size))
            self.register_buffer("std_scale", torch.empty(config.hidden_size))

    std_bias: Tensor
    std_scale: Tensor

    def forward(self, pixels: Tensor, positions: Tensor) -> Tensor:
        x = self.patch_embedder(pixels, positions)
        x = self.encoder(x, positions)
        x = self.pooler(x, positions)  # [soft tokens, hidden_size], float32
        if self.standardize:
            x = (x - self.std_bias) * self.std_scale
        return x.to(pixels.dtype)
