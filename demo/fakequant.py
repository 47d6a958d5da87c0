"""Quantization as the finished checkpoint will have it, during training.

llm-compressor rounds every linear of the language model to symmetric int4 in groups of 32, with
scales from the largest magnitude in the group. Training against exactly that rounding, with the
gradient passed straight through, lets the weights settle where the rounding does not hurt.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

GROUP = 32


def fake_quantize(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.detach().bfloat16().unflatten(-1, (-1, GROUP))
    # 16 levels from -8 to 7 span 15 steps, so half of them reach the largest magnitude.
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    scale = scale.masked_fill(scale == 0, 1.0)
    levels = (groups / scale).round().clamp(-8, 7)
    return (levels.to(weight.dtype) * scale.to(weight.dtype)).flatten(-2)


class FakeQuantLinear(nn.Linear):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rounded = self.weight + (fake_quantize(self.weight) - self.weight).detach()
        return linear(hidden, rounded)


def quantized_linears(model: PreTrainedModel) -> Iterator[nn.Linear]:
    for module in model.model.language_model.modules():
        if isinstance(module, nn.Linear):
            yield module


def start_fake_quantization(model: PreTrainedModel) -> None:
    """From now on the listed linears compute with rounded weights; what is stored stays as is."""
    for module in quantized_linears(model):
        module.__class__ = FakeQuantLinear
