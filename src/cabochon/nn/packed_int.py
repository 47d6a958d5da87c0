"""`PackedIntWeight`: integers of 2 to 8 bits in dense streams, with a scale for each group.

What an entry means is `(code - zero) * scale`, multiplied and rounded in the scale's dtype, as
compressed-tensors, GPTQModel, AutoAWQ and AutoRound decode it. `dense` therefore equals their
decompression bit for bit, and float32 asks for the same numbers, widened: the producer's rounding
is part of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cabochon.nn import bits as streams
from cabochon.nn.layout import Layout
from cabochon.nn.weight import Coded, Weight


class PackedIntWeight(Weight):
    """A matrix of unsigned codes, `bits` each, packed along the input dimension.

    Args:
        words: int32 `[out, ceil(in * bits / 32)]`; entry i starts at bit `i * bits` of its row.
        scales: float `[out, ceil(in / group)]`.
        zeros: uint8 like `scales`, the code that stands for zero; None: `2 ** (bits - 1)`.
        asked: scales are rounded to the dtype that is asked for, and multiplied in it, as Google's
            own format has it; else both happen in the scales' own dtype.
    """

    def __init__(
        self,
        words: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        *,
        in_features: int,
        bits: int,
        group: int,
        asked: bool = False,
    ) -> None:
        assert 2 <= bits <= 8
        assert words.dtype is torch.int32
        assert words.shape[1] == -(-in_features * bits // 32)
        assert scales.shape == (words.shape[0], -(-in_features // group))
        assert zeros is None or zeros.shape == scales.shape
        super().__init__(words.shape[0], in_features)
        self.bits = bits
        self.group = group
        self.asked = asked
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)

    words: Tensor
    scales: Tensor
    zeros: Tensor | None

    def description(self) -> Coded | None:
        if self.bits == 7:
            return None
        return Coded(
            octets=self.words.view(torch.uint8),  # the code of the lowest column comes first
            layout=Layout.stream(self.bits),
            group=self.group,
            scales=self.scales,
            zero=1 << (self.bits - 1),
            zeros=self.zeros,
            rounded=torch.float32 if self.asked else self.scales.dtype,
        )

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self._expand(slice(start, stop), dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._expand(ids.flatten(), dtype).view(*ids.shape, self.in_features)

    def _expand(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """The chosen rows in `dtype`. Every integer on the way is below 256: exact in any float."""
        codes, origin = codes_of(self.words[rows], self.bits, self.in_features)
        scales = self.scales[rows]
        if self.asked:
            scales = scales.to(dtype)
        zeros = None if self.zeros is None else self.zeros[rows].to(torch.bfloat16) + origin
        if self.in_features % self.group == 0:  # [rows, groups, group], so that both broadcast
            codes = codes.view(len(codes), -1, self.group)
            scales = scales[:, :, None]
            zeros = None if zeros is None else zeros[:, :, None]
        else:  # the last group is cut short
            scales = self._spread(scales)
            zeros = None if zeros is None else self._spread(zeros)
        codes -= origin + (1 << (self.bits - 1)) if zeros is None else zeros
        values = codes.to(scales.dtype)
        values *= scales
        return values.to(dtype).view(-1, self.in_features)

    def _spread(self, grouped: Tensor) -> Tensor:  # [rows, groups] -> [rows, in_features]
        return grouped.repeat_interleave(self.group, dim=1)[:, : self.in_features]


def codes_of(words: Tensor, bits: int, count: int) -> tuple[Tensor, int]:
    """Unsigned codes plus an origin, as bfloat16 `[rows, count]`, of int32 `[rows, n]`."""
    octets = words.view(torch.uint8)
    if bits != 4:
        return streams.unpack(octets, bits, count).to(torch.bfloat16), 0
    # The two codes of a byte go into the mantissas of two bfloat16s: 0x4300 | code is 128 + code.
    # Measured on two cores: 4 billion entries a second, 2.3 by splitting and converting nibbles.
    pairs = octets.to(torch.int32)
    pairs *= 0x1001
    pairs &= 0x000F000F
    pairs |= 0x43004300
    return pairs.view(torch.bfloat16)[:, :count], 128


def unpack_columns(words: Tensor, bits: int, out_features: int) -> Tensor:
    """Zero points, packed along the output: int32 `[n, groups]` to uint8 `[out, groups]`."""
    octets = words.T.contiguous().view(torch.uint8)  # [groups, n * 4]
    return streams.unpack(octets, bits, out_features).T.contiguous()
