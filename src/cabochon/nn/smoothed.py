"""What AWQ and SVDQuant put around a quantized matrix: scaled activations, and a correction.

Recipes that round activations round them in between: after they have been scaled, and not those
that the correction is made of.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cabochon.nn.minifloat import E4M3_MAX, round_e4m3
from cabochon.nn.weight import Weight


class SmoothedWeight(Weight):
    """A matrix whose columns were divided by what activations are multiplied with.

    Args:
        inner: the matrix as it is stored.
        scale: float `[in]`, what each activation is multiplied with.
    """

    def __init__(self, inner: Weight, scale: Tensor) -> None:
        assert scale.shape == (inner.in_features,)
        super().__init__(inner.out_features, inner.in_features)
        self.inner = inner
        self.register_buffer("scale", scale)

    scale: Tensor

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return (self.inner.dense(torch.float32, start, stop) * self.scale.float()).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.inner.rows(ids, torch.float32) * self.scale.float()).to(dtype)

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return self.inner.linear(x * self.scale.to(x.dtype), start, stop)


class CorrectedWeight(Weight):
    """A matrix and one of low rank that makes up for what its quantization lost.

    Args:
        inner: the matrix as it is stored.
        down: float `[rank, in]`.
        up: float `[out, rank]`.
    """

    def __init__(self, inner: Weight, down: Tensor, up: Tensor) -> None:
        assert down.shape == (up.shape[1], inner.in_features)
        assert up.shape[0] == inner.out_features
        super().__init__(inner.out_features, inner.in_features)
        self.inner = inner
        self.register_buffer("down", down)
        self.register_buffer("up", up)

    down: Tensor
    up: Tensor

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        correction = self.up[start:stop].float() @ self.down.float()
        return (self.inner.dense(torch.float32, start, stop) + correction).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        correction = self.up[ids].float() @ self.down.float()
        return (self.inner.rows(ids, torch.float32) + correction).to(dtype)

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        y = self.inner.linear(x, start, stop)
        y += F.linear(F.linear(x, self.down.to(x.dtype)), self.up[start:stop].to(x.dtype))
        return y


class Float8Weight(Weight):
    """A matrix whose entries are rounded to E4M3 before they are used: W4A8's integers.

    Args:
        inner: the matrix as it is stored.
        scale: float `[]`, what entries are divided by before, and multiplied with afterwards.
    """

    def __init__(self, inner: Weight, scale: Tensor) -> None:
        assert scale.shape == ()
        super().__init__(inner.out_features, inner.in_features)
        self.inner = inner
        self.register_buffer("scale", scale)

    scale: Tensor

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self._rounded(self.inner.dense(torch.float32, start, stop)).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._rounded(self.inner.rows(ids, torch.float32)).to(dtype)

    def _rounded(self, values: Tensor) -> Tensor:
        scaled = (values / self.scale).clamp(-E4M3_MAX, E4M3_MAX)
        return round_e4m3(scaled) * self.scale


def innermost(weight: Weight, around: Callable[[Weight], Weight]) -> Weight:
    """`weight` with the matrix that takes part in products in the middle of it replaced."""
    if isinstance(weight, SmoothedWeight | CorrectedWeight):
        weight.inner = innermost(weight.inner, around)
        return weight
    return around(weight)
