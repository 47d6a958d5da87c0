"""Rotary position embedding: tables are functions of positions and configuration, never buffers."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cabochon.config import RopeConfig


class Rotation(NamedTuple):
    """Cosines and sines of every pair of channels, `[tokens, 1, head_dim / 2]`."""

    cos: Tensor
    sin: Tensor


def text_rotation(
    positions: Tensor, head_dim: int, rope: RopeConfig, dtype: torch.dtype
) -> Rotation:
    """Rotations for `positions [tokens]`."""
    frequencies = text_frequencies(head_dim, rope, positions.device)
    return _rotation(positions[:, None].float() * frequencies, dtype)


def text_frequencies(head_dim: int, rope: RopeConfig, device: torch.device) -> Tensor:
    """How far each pair turns from one position to the next: `[head_dim / 2]`, float32.

    With `rope.fraction` below one ("proportional"), the first pairs rotate at the frequencies they
    would have in the whole head, and the others stay where they are.
    """
    rotating = int(rope.fraction * head_dim // 2)
    return _frequencies(head_dim, rope.theta, device, rotating)


def vision_rotation(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Rotations for patches at `positions [patches, 2]`: half of the head turns by x, half by y."""
    frequencies = _frequencies(head_dim // 2, theta, positions.device)
    angles = positions[:, :, None].float() * frequencies  # [patches, 2, head_dim / 4]
    return _rotation(angles.flatten(1), dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each channel of the first half of a head with its partner in the second half."""
    first, second = x.chunk(2, dim=-1)  # [tokens, heads, head_dim / 2] each
    cos, sin = rotation
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """`rotate` within each half of the head on its own: the first turns by x, the second by y."""
    cos, sin = (table.chunk(2, dim=-1) for table in rotation)
    parts = x.chunk(2, dim=-1)
    turned = [rotate(p, Rotation(c, s)) for p, c, s in zip(parts, cos, sin, strict=True)]
    return torch.cat(turned, dim=-1)


@cache
def _frequencies(dim: int, theta: float, device: torch.device, rotating: int = -1) -> Tensor:
    """Of `dim / 2` pairs, of which those behind the first `rotating` stay where they are."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / theta**exponents
    if rotating >= 0:
        frequencies[rotating:] = 0.0
    return frequencies


def _rotation(angles: Tensor, dtype: torch.dtype) -> Rotation:
    return Rotation(angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None])
