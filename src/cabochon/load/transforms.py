"""What is done to a stored tensor so that it is the one the model needs; each undoes a converter.

Transforms are values of a plan. They are for float tensors, never for matrices in blocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Transform = Literal[
    "scalar", "depthwise", "channels last", "axes swapped", "before softplus", "taps first"
]

CHANGES: frozenset[Transform] = frozenset({"before softplus"})  # values; the others move them

Shape = tuple[int, ...]


def shape_after(how: Transform, stored: Shape) -> Shape:
    """What a stored shape becomes; one that the transform is not for stays as it is."""
    match how, stored:
        case "scalar", (1,):
            return ()
        case "depthwise", (channels, kernel):
            return (channels, 1, kernel)
        case "channels last", (rows, 3, height, width):
            return (rows, 3 * height * width)
        case "taps first", (rows, *taps, channels):  # MLX's convolutions
            return (rows, channels, *taps)
        case "axes swapped", (first, second, *rest):
            return (second, first, *rest)
        case _:
            return stored


def transform(tensor: Tensor, how: Transform, shape: Shape) -> Tensor:
    """The entries of `tensor` in the order, and the `shape`, that the model needs them in."""
    match how:
        case "channels last":
            side = math.isqrt(shape[-1] // 3)
            return tensor.reshape(*shape[:-1], 3, side, side).movedim(-3, -1).reshape(shape)
        case "axes swapped":
            stored = (shape[1], shape[0], *shape[2:])
            return tensor.reshape(stored).transpose(0, 1).contiguous()
        case "taps first":
            rows, channels, *taps = shape
            return tensor.reshape(rows, *taps, channels).movedim(-1, 1).contiguous()
        case "before softplus":
            return tensor.double().expm1().log().float()
        case _:
            return tensor.reshape(shape)
