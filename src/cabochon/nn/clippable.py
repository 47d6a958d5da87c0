"""The linear layer of the towers, with bounds on what goes in and comes out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cabochon.nn.linear import Linear


class ClippableLinear(nn.Module):
    """A linear layer whose input and output are clamped to bounds that the checkpoint brings."""

    def __init__(self, in_features: int, out_features: int, clipped: bool) -> None:
        super().__init__()
        self.clipped = clipped
        self.linear = Linear(in_features, out_features)
        if clipped:
            for bound in ("input_min", "input_max", "output_min", "output_max"):
                self.register_buffer(bound, torch.empty(()))

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.clipped:
            return self.linear(x)
        y: Tensor = self.linear(x.clamp(self.input_min.to(x.dtype), self.input_max.to(x.dtype)))
        return y.clamp(self.output_min.to(x.dtype), self.output_max.to(x.dtype))
