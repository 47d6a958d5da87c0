"""`CodebookWeight`: 4-bit codes for a table of 16, with scales of blocks that may span rows.

This is bitsandbytes' storage of NF4 and FP4. The matrix is flattened, so that where its width is no
multiple of a block, a block begins in one row and ends in the next. What an entry means is
bitsandbytes' own definition: `table[code] * scale` in float32, rounded to the dtype that the matrix
had before. float32 asks for the same numbers, widened.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cabochon.nn.layout import Layout
from cabochon.nn.weight import Coded, Weight

NESTED = 256  # scales that share a scale of their own


class NestedScales(nn.Module):
    """Scales that are quantized themselves, "double quantization".

    Args:
        codes: uint8 `[blocks]`.
        table: float32 `[256]`, what they stand for.
        scales: float32 `[ceil(blocks / 256)]`.
        offset: what is added to each scale at last.
    """

    def __init__(self, codes: Tensor, table: Tensor, scales: Tensor, offset: float) -> None:
        assert codes.dtype is torch.uint8
        assert table.shape == (256,)
        assert scales.shape == (-(-len(codes) // NESTED),)
        super().__init__()
        self.offset = offset
        self.register_buffer("codes", codes)
        self.register_buffer("table", table)
        self.register_buffer("scales", scales)

    codes: Tensor
    table: Tensor
    scales: Tensor

    def forward(self, blocks: Tensor) -> Tensor:
        """The scales of blocks by their numbers (any shape), float32."""
        return self.table[self.codes[blocks].int()] * self.scales[blocks // NESTED] + self.offset


class PlainScales(nn.Module):
    """Scales as they are: float32 `[blocks]`."""

    def __init__(self, scales: Tensor) -> None:
        assert scales.dtype is torch.float32
        super().__init__()
        self.register_buffer("scales", scales)

    scales: Tensor

    def forward(self, blocks: Tensor) -> Tensor:
        """The scales of blocks by their numbers (any shape), float32."""
        return self.scales[blocks]


class CodebookWeight(Weight):
    """A matrix of 4-bit codes.

    Args:
        codes: uint8 `[out, in / 2]`, the even column in the high half of a byte.
        table: float32 `[16]`, what each code stands for before it is scaled.
        scales: of blocks, counted through all rows.
        block: entries that share a scale.
        rounding: the dtype to which entries are rounded.
    """

    def __init__(
        self,
        codes: Tensor,
        table: Tensor,
        scales: PlainScales | NestedScales,
        *,
        block: int,
        rounding: torch.dtype,
    ) -> None:
        assert codes.dtype is torch.uint8
        assert table.shape == (16,)
        super().__init__(codes.shape[0], 2 * codes.shape[1])
        self.block = block
        self.rounding = rounding
        self.scales = scales
        self.register_buffer("codes", codes)
        self.register_buffer("table", table)
        # both entries of a byte: [256, 2]
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), dim=1)
        self.register_buffer("pairs", pairs)

    codes: Tensor
    table: Tensor
    pairs: Tensor

    def description(self) -> Coded | None:
        if self.in_features % self.block:
            return None
        across = self.in_features // self.block
        blocks = torch.arange(self.out_features * across, device=self.codes.device)
        return Coded(
            octets=self.codes,
            layout=Layout.stream(4, high_first=True),
            group=self.block,
            scales=self.scales(blocks).view(-1, across),
            values=tuple(self.table.tolist()),
            rounded=self.rounding,
        )

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        codes = self.codes[start:stop]
        numbers = torch.arange(start, start + len(codes), device=codes.device)
        return self._expand(codes, numbers).to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        numbers = ids.flatten().long()
        values = self._expand(self.codes[numbers], numbers)
        return values.to(dtype).view(*ids.shape, self.in_features)

    def _expand(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """`codes [rows, in / 2]` of the rows `numbers`, in the dtype that they are rounded to."""
        width, block = self.in_features, self.block
        # `embedding` reads tables several times faster than indexing does.
        values = F.embedding(codes.int(), self.pairs).flatten(1)  # [rows, in]
        if width % block == 0:
            across = torch.arange(width // block, device=codes.device)
            blocks = numbers[:, None] * (width // block) + across
            values.view(len(codes), -1, block).mul_(self.scales(blocks)[..., None])
        else:
            entries = numbers[:, None] * width + torch.arange(width, device=codes.device)
            values *= self.scales(entries // block)
        return values.to(self.rounding)
