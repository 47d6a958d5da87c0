"""`BlockWeight`: ggml's blocks as they are stored, and what their bytes stand for.

What an entry means is ggml's definition (ggml-quants.c, and gguf-py's `quants`): sums and products
in float32, in the same order, so that `dense` in float32 equals gguf-py's decoding bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cabochon.nn.weight import Weight

Decode = Callable[[Tensor], Tensor]  # uint8 [blocks, bytes] -> float32 [blocks, entries]


class BlockWeight(Weight):
    """A matrix of blocks.

    Args:
        blocks: uint8 `[out, bytes of a row]`.
        kind: ggml's name of them, "Q4_K".
        factor: float32 `[]`, what all entries are multiplied with besides; None: nothing.
    """

    def __init__(
        self, blocks: Tensor, kind: str, factor: Tensor | None = None, *, in_features: int
    ) -> None:
        assert blocks.dtype is torch.uint8
        super().__init__(blocks.shape[0], in_features)
        self.kind = kind
        self.entries = _ENTRIES[kind]
        assert in_features % self.entries == 0
        assert blocks.shape[1] % (in_features // self.entries) == 0
        self.register_buffer("blocks", blocks)
        self.register_buffer("factor", factor)

    blocks: Tensor
    factor: Tensor | None

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self._expand(self.blocks[start:stop]).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        values = self._expand(self.blocks[ids.flatten()])
        return values.to(dtype).view(*ids.shape, self.in_features)

    def _expand(self, rows: Tensor) -> Tensor:
        values = decode(rows.view(-1, rows.shape[1] * self.entries // self.in_features), self.kind)
        if self.factor is not None:
            values *= self.factor
        return values.view(-1, self.in_features)


def decode(blocks: Tensor, kind: str) -> Tensor:
    """Blocks of a kind, uint8 `[n, bytes]`, as float32 `[n, entries]`."""
    return _DECODERS[kind](blocks).flatten(1)


def damaged(blocks: Tensor, kind: str) -> int:
    """How many of the blocks, uint8 `[n, bytes]`, have a scale that is no finite number."""
    if kind == "MXFP4":  # a power of two by its exponent; 6 times the last few is no float32
        bad = blocks[:, :1] > 252
    elif kind == "NVFP4":  # an unsigned E4M3
        bad = blocks[:, :4] >= 127
    else:
        halves = [_half(blocks, at) for at in _HALVES[kind]]
        bad = ~torch.cat(halves, dim=1).isfinite()
    return int(bad.any(dim=1).sum())


def _half(blocks: Tensor, at: int) -> Tensor:  # [n, bytes] -> [n, 1]
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _split(octets: Tensor, bits: int, run: int) -> Tensor:
    """Numbers of a few bits each, from runs of octets: all low parts of a run, then the next.

    `[n, m]` to `[n, 8 / bits * m]`, uint8.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=octets.device)
    runs = octets.unflatten(1, (-1, 1, run)) >> shifts[:, None]
    return (runs & ((1 << bits) - 1)).flatten(1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:  # [n, bytes] -> [n, 32], 0 or 16
    word = blocks[:, at : at + 4].contiguous().view(torch.int32)
    return ((word >> torch.arange(32, device=blocks.device)) & 1).to(torch.uint8) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_split(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _split(blocks[:, 4:], 4, 16).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _split(blocks[:, 6:], 4, 16) | _fifth_bits(blocks, 2)
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _split(blocks[:, 8:], 4, 16) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _q2_k(blocks: Tensor) -> Tensor:
    """16 sub-blocks of 16, each with a scale and a minimum of 4 bits."""
    pairs = blocks[:, :16]
    scales = _half(blocks, 80) * (pairs & 15).float()
    minima = _half(blocks, 82) * (pairs >> 4).float()
    codes = _split(blocks[:, 16:80], 2, 32).unflatten(1, (16, 16)).float()
    return scales[:, :, None] * codes - minima[:, :, None]


def _q3_k(blocks: Tensor) -> Tensor:
    """16 sub-blocks of 16, each with a scale of 6 bits: four of them in 8 octets, two in 4."""
    low, high = _split(blocks[:, 96:104], 4, 8), _split(blocks[:, 104:108], 2, 4)
    scales = _half(blocks, 108) * ((low | high << 4).float() - 32)
    # A set bit means that nothing is taken away.
    above = _split(blocks[:, :32], 1, 32) << 2
    codes = (_split(blocks[:, 32:96], 2, 32) | above).unflatten(1, (16, 16)).float() - 4
    return scales[:, :, None] * codes


def _scales_and_minima(octets: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of 6 bits each that Q4_K and Q5_K keep in 12 octets."""
    first, second, rest = octets.split(4, dim=1)
    scales = torch.cat((first & 63, (rest & 15) | (first >> 6 << 4)), dim=1)
    minima = torch.cat((second & 63, (rest >> 4) | (second >> 6 << 4)), dim=1)
    return scales.float(), minima.float()


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, _split(blocks[:, 16:], 4, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    return _with_minima(
        blocks, _split(blocks[:, 48:], 4, 32) | _split(blocks[:, 16:48], 1, 32) << 4
    )


def _with_minima(blocks: Tensor, codes: Tensor) -> Tensor:
    """8 sub-blocks of 32; `codes [n, 256]`."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scales, minima = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return scales[:, :, None] * codes.unflatten(1, (8, 32)).float() - minima[:, :, None]


def _q6_k(blocks: Tensor) -> Tensor:
    """16 sub-blocks of 16, each with a signed octet for a scale."""
    codes = _split(blocks[:, :128], 4, 64) | _split(blocks[:, 128:192], 2, 32) << 4
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return scales[:, :, None] * (codes.unflatten(1, (16, 16)).float() - 32)


# fmt: off
_IQ4 = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32
)
_E2M1_TWICE = torch.tensor(
    [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.float32
)
# fmt: on


def _look_up(codes: Tensor, table: Tensor) -> Tensor:
    return table.to(codes.device)[codes.int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _look_up(_split(blocks[:, 2:], 4, 16), _IQ4)


def _iq4_xs(blocks: Tensor) -> Tensor:
    """8 sub-blocks of 32, each with a scale of 6 bits."""
    low = _split(blocks[:, 4:8], 4, 1)
    high = _split(blocks[:, 2:4], 2, 1)
    scales = _half(blocks, 0) * ((low | high << 4).float() - 32)
    return scales[:, :, None] * _look_up(_split(blocks[:, 8:], 4, 16), _IQ4).unflatten(1, (8, 32))


def _mxfp4(blocks: Tensor) -> Tensor:
    """Entries are stored for twice their value, so that the scale stands for half of its own."""
    exponents = blocks[:, :1].int()
    normal, subnormal = (exponents - 1) << 23, 0x200000 << exponents.clamp(max=1)
    halves = torch.where(exponents < 2, subnormal, normal).view(torch.float32)
    return halves * _look_up(_split(blocks[:, 1:], 4, 16), _E2M1_TWICE)


def _nvfp4(blocks: Tensor) -> Tensor:
    """4 sub-blocks of 16, each with an unsigned E4M3 for a scale."""
    octets = blocks[:, :4].int()
    exponents, mantissas = octets >> 3 & 15, (octets & 7).float()
    normal = (1 + mantissas / 8) * torch.exp2(exponents.float() - 7)
    scales = torch.where(exponents == 0, mantissas * 2.0**-9, normal) * 0.5
    codes = _split(blocks[:, 4:], 4, 8).unflatten(1, (4, 16))
    return scales[:, :, None] * _look_up(codes, _E2M1_TWICE)


_DECODERS: Mapping[str, Decode] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}

_ENTRIES = {kind: 256 if kind.endswith("_K") or kind == "IQ4_XS" else 32 for kind in _DECODERS}
_ENTRIES["NVFP4"] = 64

# Where in a block its 16-bit floats are.
_HALVES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
