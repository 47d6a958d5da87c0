"""`Float4Weight`: 4-bit floats (E2M1), and a scale of 8 bits for each block of a row.

Entries are decoded by table. Their product with the scale is made in float32 and rounded to
bfloat16, as compressed-tensors and ModelOpt both decompress; float32 asks for the same numbers,
widened.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cabochon.nn.layout import Layout
from cabochon.nn.minifloat import E2M1, E2M1_PAIRS
from cabochon.nn.weight import Coded, Weight


class Float4Weight(Weight):
    """A matrix of 4-bit floats.

    Args:
        codes: uint8 `[out, ceil(in / 2)]`, the even column in the low half of a byte.
        scales: uint8 `[out, ceil(in / block)]`.
        levels: float32 `[256]`, what each byte of `scales` multiplies with: if the matrix has a
            scale of its own, which one producer divides by and the other multiplies with, that is
            part of it.
        block: neighbours that share a scale.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, levels: Tensor, *, in_features: int, block: int
    ) -> None:
        assert codes.dtype is scales.dtype is torch.uint8
        assert codes.shape[1] == -(-in_features // 2)
        assert scales.shape == (codes.shape[0], -(-in_features // block))
        assert levels.shape == (256,)
        super().__init__(codes.shape[0], in_features)
        self.block = block
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("levels", levels)

    codes: Tensor
    scales: Tensor
    levels: Tensor

    def description(self) -> Coded:
        return Coded(
            octets=self.codes,
            layout=Layout.stream(4),
            group=self.block,
            scales=self.scales,
            levels=self.levels,
            values=tuple(E2M1.tolist()),
            rounded=torch.bfloat16,
        )

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self._expand(slice(start, stop), dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._expand(ids.flatten(), dtype).view(*ids.shape, self.in_features)

    def _expand(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        # `embedding` reads tables several times faster than indexing does.
        pairs = E2M1_PAIRS.to(self.codes.device)
        values = F.embedding(self.codes[rows].int(), pairs).flatten(1)[:, : self.in_features]
        scales = F.embedding(self.scales[rows].int(), self.levels[:, None])  # [rows, blocks, 1]
        if self.in_features % self.block == 0:
            blocks = values.view(len(values), -1, self.block)
            blocks *= scales
        else:  # the last block is cut short
            spread = scales.flatten(1).repeat_interleave(self.block, dim=1)
            values = values * spread[:, : self.in_features]
        return values.to(torch.bfloat16).to(dtype)
