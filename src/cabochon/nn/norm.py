"""Normalizations, in float32 whatever comes in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`; Gemma 4 multiplies by the plain weight, not by one plus it.

    With `dim` None there is no weight, as for attention's values and the vision projector.
    """

    weight: Tensor | None  # [dim]

    def __init__(self, eps: float, dim: int | None = None) -> None:
        super().__init__()
        self.eps = eps
        weight = None if dim is None else nn.Parameter(torch.empty(dim), requires_grad=False)
        self.register_parameter("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            wide = wide * self.weight
        return wide.to(x.dtype)


class LayerNorm(nn.Module):
    """Mean and variance normalization with weight, and with bias unless told otherwise."""

    weight: Tensor  # [dim]
    bias: Tensor | None

    def __init__(self, dim: int, eps: float = 1e-5, *, biased: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        bias = nn.Parameter(torch.empty(dim), requires_grad=False) if biased else None
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        return F.layer_norm(x.float(), shape, self.weight, self.bias, self.eps).to(x.dtype)
