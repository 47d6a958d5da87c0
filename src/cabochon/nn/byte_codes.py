"""`ByteWeight`: a code of one byte for each entry, an integer or a float, and a grid of scales.

An entry is `value * scale`, multiplied in float32 and rounded to the dtype in which its producer
multiplies; float32 asks for the same numbers, widened. One scale for all, one a row and one for
each block of rows and columns differ in nothing but the size of a cell of the grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cabochon.nn.layout import Layout
from cabochon.nn.minifloat import E4M3
from cabochon.nn.weight import Coded, StoredFloats, Weight


class ByteWeight(Weight):
    """A matrix of 8-bit codes.

    Args:
        codes: int8 `[out, in]`; or, if there is a table, uint8.
        scales: float `[ceil(out / cell[0]), ceil(in / cell[1])]`; or, if there are levels, uint8.
        table: float32 `[256]`, what each code stands for; None: itself.
        zeros: int8 like `scales`, the code that stands for zero; None: zero does.
        levels: float32 `[256]`, what each code of a scale stands for; None: itself.
        cell: rows and columns that share a scale.
        rounding: the dtype to which entries are rounded.
        factor: what entries are multiplied with at last.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        table: Tensor | None = None,
        *,
        zeros: Tensor | None = None,
        levels: Tensor | None = None,
        cell: tuple[int, int],
        rounding: torch.dtype = torch.float32,
        factor: float = 1.0,
    ) -> None:
        assert codes.dtype is (torch.int8 if table is None else torch.uint8)
        assert table is None or table.shape == (256,)
        assert scales.shape == (-(-codes.shape[0] // cell[0]), -(-codes.shape[1] // cell[1]))
        assert levels is None or (scales.dtype is torch.uint8 and levels.shape == (256,))
        assert zeros is None or zeros.shape == scales.shape
        super().__init__(*codes.shape)
        self.cell = cell
        self.rounding = rounding
        self.factor = factor
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("table", table)
        self.register_buffer("zeros", zeros)
        self.register_buffer("levels", levels)

    codes: Tensor
    scales: Tensor
    table: Tensor | None
    zeros: Tensor | None
    levels: Tensor | None

    def description(self) -> Coded | StoredFloats | None:
        known = self.scales.float() if self.levels is None else _look_up(self.scales, self.levels)
        scales = known * self.factor
        if self.table is None:
            zeros = None if self.zeros is None else self.zeros.view(torch.uint8) ^ 128
            return Coded(
                octets=self.codes.view(torch.uint8),
                layout=Layout.stream(8, flip=128),
                group=self.cell[1],
                scales=self._each_row(scales),
                zero=128,
                zeros=None if zeros is None else self._each_row(zeros),
                rounded=self.rounding,
                exact=self.factor == 1,
            )
        if not torch.equal(self.table.nan_to_num(), E4M3.nan_to_num()):
            return None
        return StoredFloats(
            data=self.codes,
            scales=scales,
            scale_rows=self.cell[0],
            scale_columns=self.cell[1],
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
        """`codes [rows, in]` of the rows `numbers`, in the dtype that they are rounded to."""
        values = codes.float() if self.table is None else _look_up(codes, self.table)
        cells = numbers // self.cell[0]
        if self.zeros is not None:
            values = values - self._spread(self.zeros[cells].float())
        scales = self.scales[cells]
        scales = scales.float() if self.levels is None else _look_up(scales, self.levels)
        if scales.shape[1] == 1:
            values *= scales
        elif self.in_features % self.cell[1] == 0:
            values.view(len(codes), -1, self.cell[1]).mul_(scales[..., None])
        else:  # the last cell is cut short
            values *= self._spread(scales)
        if self.factor != 1:
            values *= self.factor
        return values.to(self.rounding)

    def _each_row(self, grid: Tensor) -> Tensor:  # [cells, n] -> [out_features, n]
        return grid.repeat_interleave(self.cell[0], dim=0)[: self.out_features]

    def _spread(self, grid: Tensor) -> Tensor:  # [rows, cells] -> [rows, in_features]
        return grid.repeat_interleave(self.cell[1], dim=1)[:, : self.in_features]


def _look_up(codes: Tensor, table: Tensor) -> Tensor:
    # `embedding` reads tables several times faster than indexing does.
    return F.embedding(codes.int(), table[:, None]).flatten(1)
