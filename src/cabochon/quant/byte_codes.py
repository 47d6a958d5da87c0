"""Matrices with a byte for each entry, an integer or a float, and scales beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cabochon.quant.scheme import FLOATS, Site, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from cabochon.nn.weight import Weight

Cell = tuple[int | None, int | None]  # rows and columns that share a scale; None: all

_CODES = {"int8": "I8", "fp8": "F8_E4M3", "mxfp8": "F8_E4M3"}


@dataclass(frozen=True, slots=True)
class ByteCodes:
    """compressed-tensors' `int-quantized`, `float-quantized`, `naive-quantized`, `mxfp8-quantized`.

    The last has powers of two for scales, stored as their exponents.
    """

    numbers: Literal["int8", "fp8", "mxfp8"]
    cell: Cell
    symmetric: bool = True
    scale: str = "weight_scale"  # its leaf
    listed: bool = False  # the scales of rows are a list, not a column, as ModelOpt has them

    @property
    def name(self) -> str:
        if self.numbers == "mxfp8":
            return self.numbers
        rows, columns = self.cell
        if columns is None:
            sharing = "tensor" if rows is None else "channel"
        else:
            sharing = f"g{columns}" if rows == 1 else f"{rows}x{columns}"
        return f"{self.numbers} {sharing}" + ("" if self.symmetric else " asymmetric")

    @property
    def bits(self) -> int:
        return 8

    @property
    def slots(self) -> tuple[Slot, ...]:
        rows, columns = self.cell
        axes: tuple[str, ...] = ()
        if rows is not None:
            across = "1" if columns is None else f"in/{columns}"
            axes = ("out" if rows == 1 else f"out/{rows}", across)
            axes = axes[:1] if self.listed else axes
        codes = Slot("weight", frozenset({_CODES[self.numbers]}), ("out", "in"), "codes")
        if self.numbers == "mxfp8":
            return codes, Slot(self.scale, frozenset({"U8"}), axes, "scales")
        scales = Slot(self.scale, FLOATS, axes, "scales")
        if self.symmetric:
            return codes, scales
        return codes, scales, Slot("weight_zero_point", frozenset({"I8"}), axes, "codes")

    def build(self, stored: Mapping[str, Tensor], site: Site) -> Weight:
        import torch

        from cabochon.nn.byte_codes import ByteWeight
        from cabochon.nn.minifloat import E4M3, E8M0

        rows, columns = self.cell
        cell = rows or site.out_features, columns or site.in_features
        grid = -(-site.out_features // cell[0]), -(-site.in_features // cell[1])
        codes, scales = stored["weight"], stored[self.scale].reshape(grid)
        zeros = None if self.symmetric else stored["weight_zero_point"].reshape(grid)
        if self.numbers == "int8":
            return ByteWeight(codes, scales, zeros=zeros, cell=cell, rounding=scales.dtype)
        micro = self.numbers == "mxfp8"
        return ByteWeight(
            codes.view(torch.uint8),
            scales,
            E4M3,
            cell=cell,
            levels=E8M0 if micro else None,
            rounding=torch.bfloat16 if micro else scales.dtype,
        )
