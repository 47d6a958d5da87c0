"""`BlockWeight`: ggml's blocks as they are stored, and what their bytes stand for.

What an entry means is ggml's definition (ggml-quants.c, and gguf-py's `quants`): products and sums
in float32, in the same order, so that `dense` in float32 equals gguf-py's decoding bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cabochon.nn.layout import Layout, Plane
from cabochon.nn.weight import Coded, Weight


class BlockWeight(Weight):
    """A matrix of blocks.

    Args:
        blocks: uint8 `[out, bytes of a row]`.
        kind: ggml's name of them, "Q4_K".
        factor: float32 `[]`, what multiplies all scales of an NVFP4 besides; None: nothing.
    """

    def __init__(
        self, blocks: Tensor, kind: str, factor: Tensor | None = None, *, in_features: int
    ) -> None:
        assert blocks.dtype is torch.uint8
        super().__init__(blocks.shape[0], in_features)
        self.kind = kind
        self._kind = KINDS[kind]
        entries, nbytes = self._kind.layout.entries, self._kind.layout.nbytes
        assert blocks.shape[1] * entries == in_features * nbytes
        assert factor is None or self._kind.levels is not None
        self.register_buffer("blocks", blocks)
        self.register_buffer("factor", factor)

    blocks: Tensor
    factor: Tensor | None

    def description(self) -> Coded:
        kind = self._kind
        scales, shared, minima, shared_minima = kind.scales(self._of(slice(None)))
        return Coded(
            octets=self.blocks,
            layout=kind.layout,
            group=kind.group,
            scales=scales.reshape(self.out_features, -1),
            levels=self._levels(),
            shared=self._by_row(shared),
            zero=kind.zero,
            minima=self._by_row(minima),
            shared_minima=self._by_row(shared_minima),
            values=kind.values,
        )

    def _by_row(self, numbers: Tensor | None) -> Tensor | None:
        return None if numbers is None else numbers.reshape(self.out_features, -1)

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self._expand(slice(start, stop)).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._expand(ids.flatten()).to(dtype).view(*ids.shape, self.in_features)

    def _of(self, rows: slice | Tensor) -> Tensor:
        """The blocks of some rows, `[n, bytes]`."""
        return self.blocks[rows].view(-1, self._kind.layout.nbytes)

    def _levels(self) -> Tensor | None:
        levels = self._kind.levels
        return levels if levels is None or self.factor is None else levels * self.factor

    def _expand(self, rows: slice | Tensor) -> Tensor:
        return _decode(self._of(rows), self._kind, self._levels()).view(-1, self.in_features)


def decode(blocks: Tensor, kind: str) -> Tensor:
    """Blocks of a kind, uint8 `[n, bytes]`, as float32 `[n, entries]`."""
    return _decode(blocks, KINDS[kind], KINDS[kind].levels)


def damaged(blocks: Tensor, kind: str) -> int:
    """How many of the blocks, uint8 `[n, bytes]`, have a scale that is no finite number."""
    if kind == "MXFP4":  # a power of two by its exponent; 6 times the last few is no float32
        bad = blocks[:, :1] > 252
    elif kind == "NVFP4":  # an unsigned E4M3
        bad = blocks[:, :4] > 126
    else:
        halves = [t for t in KINDS[kind].scales(blocks) if t is not None and t.is_floating_point()]
        bad = torch.from_numpy(np.hstack([_magnitude_bits(half) >= 0x7C00 for half in halves]))
    return int(bad.any(dim=1).sum()) if bad.any() else 0


def look_at(blocks: Tensor, kind: str) -> tuple[int, int, float]:
    """Of what codes of the blocks, uint8 `[n, bytes]`, are multiplied with: see `magnitudes`.

    How many there are, how many are zero, and the largest. No block is damaged. One thread does it:
    waking torch's, on a busy machine, takes longer.
    """
    scales, shared, _, _ = KINDS[kind].scales(blocks)
    levels = KINDS[kind].levels
    if levels is not None:
        counts = np.bincount(scales.numpy().ravel(), minlength=256)
        known = levels.abs().numpy()
        return scales.numel(), int(counts[known == 0].sum()), float(known[counts > 0].max())
    if shared is None:
        bits = _magnitude_bits(scales)
        dead = bits.size - int(np.count_nonzero(bits))
        return bits.size, dead, float(bits.max().view(np.float16))
    within, by = scales.numpy(), shared.numpy()[:, 0]
    alive = int(np.count_nonzero(within if by.all() else within[by != 0]))
    top = np.maximum(within.max(axis=1).astype(np.int16), -within.min(axis=1).astype(np.int16))
    return within.size, within.size - alive, float((top * np.abs(by.astype(np.float32))).max())


def _magnitude_bits(halves: Tensor) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Without their signs, floats are ordered as their bits are."""
    bits: np.ndarray[Any, np.dtype[np.int16]] = halves.view(torch.int16).numpy() & 0x7FFF
    return bits


def magnitudes(blocks: Tensor, kind: str) -> Tensor:
    """What the codes of the blocks, uint8 `[n, bytes]`, are multiplied with, without its sign.

    Float32 `[n, groups]`.
    """
    scales, shared, _, _ = KINDS[kind].scales(blocks)
    levels = KINDS[kind].levels
    factors = scales.float() if levels is None else levels[scales.int()]
    return (factors if shared is None else shared.float() * factors).abs()


class Scales(NamedTuple):
    """What the codes of a block count, a column a group; see `Coded`."""

    scales: Tensor
    shared: Tensor | None = None
    minima: Tensor | None = None
    shared_minima: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of ggml's blocks."""

    layout: Layout
    group: int
    scales: Callable[[Tensor], Scales]
    zero: int = 0
    values: tuple[float, ...] | None = None
    levels: Tensor | None = None  # float32 [256]: what a byte of `scales` stands for


def _decode(blocks: Tensor, kind: Kind, levels: Tensor | None) -> Tensor:
    scales, shared, minima, shared_minima = kind.scales(blocks)
    factors = scales.float() if levels is None else levels.to(blocks.device)[scales.int()]
    if shared is not None:
        factors = shared.float() * factors
    codes = kind.layout.codes(blocks, kind.layout.entries)
    if kind.values is None:
        values = codes.float()
        values -= kind.zero
    else:
        values = torch.tensor(kind.values, device=blocks.device)[codes.int()]
    grouped = values.unflatten(1, (-1, kind.group))
    grouped *= factors[:, :, None]
    if minima is not None:
        lowest = minima.float()
        lowest = lowest if shared_minima is None else shared_minima.float() * lowest
        grouped -= lowest[:, :, None]
    return grouped.flatten(1)


def _half(blocks: Tensor, at: int) -> Tensor:  # [n, bytes] -> float16 [n, 1], not copied
    return blocks.view(torch.float16)[:, at // 2 : at // 2 + 1]


def _one_half(blocks: Tensor) -> Scales:
    return Scales(_half(blocks, 0))


def _first(count: int) -> Callable[[Tensor], Scales]:
    return lambda blocks: Scales(blocks[:, :count])


def _half_and_least(blocks: Tensor) -> Scales:
    return Scales(_half(blocks, 0), minima=-_half(blocks, 2))  # the least is added


def _scales_q2_k(blocks: Tensor) -> Scales:
    pairs = blocks[:, :16]
    return Scales(pairs & 15, _half(blocks, 80), pairs >> 4, _half(blocks, 82))


def _scales_q3_k(blocks: Tensor) -> Scales:
    """16 of 6 bits: four of them in 8 octets, two in 4."""
    low, high = Plane(96, 4, 8).codes(blocks, 16), Plane(104, 2, 4, 4).codes(blocks, 16)
    return Scales((low | high).view(torch.int8) - 32, _half(blocks, 108))


def _scales_q4_k(blocks: Tensor) -> Scales:
    """8 scales and 8 minima of 6 bits each, in 12 octets."""
    first, second, rest = blocks[:, 4:16].split(4, dim=1)
    scales = torch.cat((first & 63, (rest & 15) | (first >> 6 << 4)), dim=1)
    minima = torch.cat((second & 63, (rest >> 4) | (second >> 6 << 4)), dim=1)
    return Scales(scales, _half(blocks, 0), minima, _half(blocks, 2))


def _scales_q6_k(blocks: Tensor) -> Scales:
    return Scales(blocks[:, 192:208].contiguous().view(torch.int8), _half(blocks, 208))


def _scales_iq4_xs(blocks: Tensor) -> Scales:
    low, high = Plane(4, 4).codes(blocks, 8), Plane(2, 2, to=4).codes(blocks, 8)
    return Scales((low | high).view(torch.int8) - 32, _half(blocks, 0))


def _mxfp4_levels() -> Tensor:
    """Half of a power of two, since entries are stored for twice their value."""
    exponents = torch.arange(256, dtype=torch.int32)
    normal, subnormal = (exponents - 1) << 23, 0x200000 << exponents.clamp(max=1)
    return torch.where(exponents < 2, subnormal, normal).view(torch.float32)


def _nvfp4_levels() -> Tensor:
    """Half of an unsigned E4M3."""
    octets = torch.arange(256)
    exponents, mantissas = octets >> 3 & 15, (octets & 7).float()
    normal = (1 + mantissas / 8) * torch.exp2(exponents.float() - 7)
    return torch.where(exponents == 0, mantissas * 2.0**-9, normal) * 0.5


# fmt: off
_IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
        1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
_E2M1_TWICE = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0,
               0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)
# fmt: on


def _layout(entries: int, nbytes: int, *planes: tuple[int, ...], flip: int = 0) -> Layout:
    """Planes as `at, bits, run, to`."""
    return Layout(entries, nbytes, tuple(Plane(*plane) for plane in planes), flip)


_MX, _NV = _mxfp4_levels(), _nvfp4_levels()

# Of Q3_K, a third bit that is set means that nothing is taken away: the code for zero is 4.
# Q8_0 has signed octets, and a code of 0 for the least of them.
KINDS: Mapping[str, Kind] = {
    "Q4_0": Kind(_layout(32, 18, (2, 4, 16)), 32, _one_half, zero=8),
    "Q4_1": Kind(_layout(32, 20, (4, 4, 16)), 32, _half_and_least),
    "Q5_0": Kind(_layout(32, 22, (6, 4, 16), (2, 1, 0, 4)), 32, _one_half, zero=16),
    "Q5_1": Kind(_layout(32, 24, (8, 4, 16), (4, 1, 0, 4)), 32, _half_and_least),
    "Q8_0": Kind(_layout(32, 34, (2, 8), flip=128), 32, _one_half, zero=128),
    "Q2_K": Kind(_layout(256, 84, (16, 2, 32)), 16, _scales_q2_k),
    "Q3_K": Kind(_layout(256, 110, (32, 2, 32), (0, 1, 32, 2)), 16, _scales_q3_k, zero=4),
    "Q4_K": Kind(_layout(256, 144, (16, 4, 32)), 32, _scales_q4_k),
    "Q5_K": Kind(_layout(256, 176, (48, 4, 32), (16, 1, 32, 4)), 32, _scales_q4_k),
    "Q6_K": Kind(_layout(256, 210, (0, 4, 64), (128, 2, 32, 4)), 16, _scales_q6_k, zero=32),
    "IQ4_NL": Kind(_layout(32, 18, (2, 4, 16)), 32, _one_half, values=_IQ4),
    "IQ4_XS": Kind(_layout(256, 136, (8, 4, 16)), 32, _scales_iq4_xs, values=_IQ4),
    "MXFP4": Kind(_layout(32, 17, (1, 4, 16)), 32, _first(1), values=_E2M1_TWICE, levels=_MX),
    "NVFP4": Kind(_layout(64, 36, (4, 4, 8)), 16, _first(4), values=_E2M1_TWICE, levels=_NV),
}
