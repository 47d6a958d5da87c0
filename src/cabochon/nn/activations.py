"""Activations rounded as a recipe says, in front of a product and behind it.

The arithmetic is compressed-tensors' own simulation of a quantized layer (its `fake_quantize`):
`x / scale`, clamped, rounded half to even, times `scale`. Upstream's kernels differ from it in the
order of sums. torchao and ModelOpt differ from it in last bits, which count where activations lie
half way between two numbers, as those of bfloat16 tables often do: they have arithmetic of their
own here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cabochon.nn.minifloat import E2M1_MAX, E4M3_MAX, round_e2m1, round_e4m3
from cabochon.nn.weight import Weight

Numbers = Literal["int4", "int8", "fp4", "fp8"]  # fp4: E2M1; fp8: E4M3
Scales = Literal["float", "e4m3", "e8m0"]

_LEAST_E4M3 = 0.125  # what upstream puts in the place of a scale that was rounded to zero
_LEAST_SCALE = 2.0**-9  # of ModelOpt's scales in E4M3, whose least number it is
_NOTHING = 2.0**-24  # ModelOpt leaves scales out where no entry is larger


class _Range(NamedTuple):
    low: float
    high: float
    rounded: Callable[[Tensor], Tensor]

    def nearest(self, x: Tensor) -> Tensor:
        return self.rounded(x.clamp(self.low, self.high))


_RANGES: dict[Numbers, _Range] = {
    "int4": _Range(-8, 7, torch.round),
    "int8": _Range(-128, 127, torch.round),
    "fp4": _Range(-E2M1_MAX, E2M1_MAX, round_e2m1),
    "fp8": _Range(-E4M3_MAX, E4M3_MAX, round_e4m3),
}


class StaticRounding(nn.Module):
    """Rounds with one scale, found once by calibration.

    Args:
        numbers: what is rounded to.
        scale: a positive number, `[1]`. The arithmetic is in the wider of its dtype and `x`'s.
        zero: int8 `[1]`, the number that stands for zero; None: zero does.
        asked: the arithmetic is in `x`'s dtype, to which the scale is rounded first.
    """

    def __init__(
        self,
        numbers: Numbers,
        scale: Tensor,
        zero: Tensor | None = None,
        *,
        asked: bool = False,
    ) -> None:
        assert scale.shape == (1,)
        super().__init__()
        self.numbers = numbers
        self.asked = asked
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    scale: Tensor
    zero: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.to(x.dtype) if self.asked else self.scale
        scaled = x / scale
        if self.zero is not None:
            scaled += self.zero.to(scaled.dtype)
        rounded = _RANGES[self.numbers].nearest(scaled)
        if self.zero is not None:
            rounded -= self.zero.to(rounded.dtype)
        return (rounded * scale).to(x.dtype)


class LargestRounding(nn.Module):
    """Rounds to FP8 as ModelOpt does (`fp8_eager`): multiplied so that the largest entry is 448.

    Args:
        scale: float32 `[1]`, a 448th of the largest; None: each token has a largest of its own.
    """

    def __init__(self, scale: Tensor | None = None) -> None:
        assert scale is None or scale.shape == (1,)
        super().__init__()
        self.register_buffer("scale", scale)

    scale: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        span, wide = _RANGES["fp8"], x.float()
        if self.scale is None:
            largest = wide.abs().amax(dim=-1, keepdim=True)
        else:
            largest = span.high * self.scale
        factor = span.high / largest.masked_fill(largest <= _NOTHING, 1)
        return (span.nearest(wide * factor) * (1 / factor)).to(x.dtype)


class DynamicRounding(nn.Module):
    """Rounds with scales made of the activations themselves, token by token.

    Args:
        numbers: what is rounded to.
        group: entries of a token that share a scale; None: all of them do.
        symmetric: whether zero stands for zero; else the smallest entry stands for the lowest
            number.
        scales: what the scales are rounded to themselves.
        whole: float32 `[1]`, what scales are multiplied with before they are rounded, and divided
            by afterwards.
        reciprocal: `whole` the other way round, in ModelOpt's arithmetic (`NVFP4QTensor`).
        multiplied: with a scale's reciprocal, not divided by it, and rounded before the zero point
            is added, as torchao does: the largest entry of a token lies half way between two
            numbers, so that its last bit counts.
    """

    def __init__(
        self,
        numbers: Numbers,
        group: int | None = None,
        *,
        symmetric: bool = True,
        scales: Scales = "float",
        whole: Tensor | None = None,
        reciprocal: bool = False,
        multiplied: bool = False,
    ) -> None:
        assert symmetric or numbers.startswith("int")
        assert not reciprocal or (scales == "e4m3" and whole is not None)
        assert not multiplied or numbers.startswith("int")
        assert whole is None or whole.shape == (1,)
        super().__init__()
        self.numbers = numbers
        self.group = group
        self.symmetric = symmetric
        self.scales = scales
        self.reciprocal = reciprocal
        self.multiplied = multiplied
        self.register_buffer("whole", whole)

    whole: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.group is None:
            return self._round(x)
        width = x.shape[-1]
        lacking = -width % self.group
        if lacking:  # the last group has a scale of its own all the same
            x = nn.functional.pad(x, (0, lacking))
        return self._round(x.unflatten(-1, (-1, self.group))).flatten(-2)[..., :width]

    def _round(self, x: Tensor) -> Tensor:  # [..., n]: the last dimension shares a scale
        span = _RANGES[self.numbers]
        low, high = (bound.to(x.dtype) for bound in x.aminmax(dim=-1, keepdim=True))
        low, high = low.clamp(max=0), high.clamp(min=0)  # zero is always among the numbers
        if self.symmetric:
            scale = self._scale(torch.maximum(-low, high), span)
            return (span.nearest(self._steps(x, scale)) * scale).to(x.dtype)
        scale = (high - low) / (span.high - span.low)
        zero = (span.low - low / scale).nan_to_num(span.low).clamp(span.low, span.high).round()
        scale = _without_zeros(scale, torch.finfo(scale.dtype).eps)
        return (span.nearest(self._steps(x, scale) + zero) - zero) * scale

    def _steps(self, x: Tensor, scale: Tensor) -> Tensor:
        return (x * (1 / scale)).round() if self.multiplied else x / scale

    def _scale(self, largest: Tensor, span: _Range) -> Tensor:
        if self.scales == "e8m0":
            return _power_of_two(largest, span.high)
        if self.reciprocal:
            assert self.whole is not None
            scale = (largest / (span.high * self.whole)).clamp(_LEAST_SCALE, E4M3_MAX)
            return round_e4m3(scale) * self.whole
        scale = largest / ((span.high - span.low) / 2)
        if self.whole is not None:
            scale = self.whole * scale
        if self.scales == "e4m3":
            scale = _without_zeros(round_e4m3(scale.clamp(max=E4M3_MAX)), _LEAST_E4M3)
        else:
            scale = _without_zeros(scale, torch.finfo(scale.dtype).eps)
        return scale if self.whole is None else scale / self.whole


def _without_zeros(scale: Tensor, least: float) -> Tensor:
    return scale.masked_fill(scale == 0, least)


def _power_of_two(largest: Tensor, highest: float) -> Tensor:
    """The scale that brings `largest` to the binade of `highest`, by the rule of E8M0 scales.

    A mantissa of 1.75 or more counts for the next power. Zero gives the least scale there is.
    """
    # Half a unit of E2M1's single bit of mantissa is a quarter of the power below.
    mantissa, exponent = torch.frexp(largest.float())  # mantissa from 0.5 to 1
    exponent = exponent - 1 + (mantissa >= 0.875)
    offset = torch.frexp(torch.tensor(highest)).exponent - 1
    exponent = torch.where(largest > 0, exponent - offset, -127).clamp(-127, 127)
    return torch.exp2(exponent.float()).to(largest.dtype)


class RoundedWeight(Weight):
    """A matrix whose products are made of rounded activations, and rounded themselves.

    What the matrix is stays untouched: `dense` and `rows` are those of `weight`.
    """

    def __init__(
        self, weight: Weight, inputs: nn.Module | None = None, outputs: nn.Module | None = None
    ) -> None:
        super().__init__(weight.out_features, weight.in_features)
        self.weight = weight
        self.inputs = inputs
        self.outputs = outputs

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self.weight.dense(dtype, start, stop)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.weight.rows(ids, dtype)

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        if self.inputs is not None:
            x = self.inputs(x)
        y = self.weight.linear(x, start, stop)
        if self.outputs is not None:
            y = self.outputs(y)
        return y
