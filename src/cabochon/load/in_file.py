"""A model whose matrices stay in their files, for those who have more time than memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cabochon.checkpoint.folder import read_tensor
from cabochon.checkpoint.headers import TensorMeta
from cabochon.load.execute import (
    Model,
    blank,
    build_weight,
    check_bounds,
    fill_parameter,
    fill_site,
)
from cabochon.load.matrices import Matrix, matrices
from cabochon.load.measure import Measure
from cabochon.load.plan import LoadPlan, SiteRead
from cabochon.nn.weight import Stack, Weight
from cabochon.quant.scheme import Slot

LARGE = 256 << 20  # bytes of a matrix
PIECE_BYTES = 32 << 20  # of stored rows that are in memory together


def in_file(
    plan: LoadPlan, *, dtype: torch.dtype, hold: Callable[[Weight], Weight] | None = None
) -> Model:
    """The model that `plan` describes, of which only norms and scalars are in memory.

    With `hold`, so is what it makes of each matrix that is no table: only tables stay in files.

    Raises:
        UnreadableError: a file ended early.
        LoadError: a value cannot be right; the text names the tensor. Of matrices it is only found
            when a file is looked at whole, by `execute` or `build_weight`.
    """
    model, measure = blank(plan), Measure()
    for parameter in plan.parameters:
        fill_parameter(model, parameter, dtype, measure)
    check_bounds(model)
    for matrix in matrices(plan):
        if hold is None or matrix.reads[0].site.kind == "embedding":
            parts: list[Weight] = [InFile(read) for read in matrix.reads]
        else:
            parts = [hold(build_weight(read, dtype)) for read in matrix.reads]
        stored = parts[0] if matrix.reads[0].part is None else Stack(parts)
        fill_site(model, matrix.name, stored)
    return model.eval()


def opened(matrix: Matrix) -> Weight:
    """A matrix to be read once from top to bottom: in memory, or in pieces if it is large."""
    parts = [InFile(read) for read in matrix.reads]
    if matrix.nbytes <= LARGE or not all(part.in_pieces for part in parts):
        return matrix.weight()
    return parts[0] if matrix.reads[0].part is None else Stack(parts)


class InFile(Weight):
    """A matrix of which every call reads what it needs, and keeps nothing.

    Where a format stores rows together, only those that are asked for are read.
    """

    def __init__(self, read: SiteRead) -> None:
        super().__init__(read.site.out_features, read.site.in_features)
        self._read = read
        self._step = _step(read)

    @property
    def in_pieces(self) -> bool:
        """Whether its rows can be read without the others."""
        return self._step is not None

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        parts = [piece.dense(dtype, *rows) for piece, rows in self._covering(start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        found = {int(i): self.dense(dtype, int(i), int(i) + 1) for i in ids.unique()}
        rows = torch.cat([found[i] for i in ids.flatten().tolist()])
        return rows.view(*ids.shape, self.in_features)

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        parts = [piece.linear(x, *rows) for piece, rows in self._covering(start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _covering(self, start: int, stop: int | None) -> Iterator[tuple[Weight, tuple[int, int]]]:
        """Weights of some rows each that hold rows `start` to `stop`, and which of theirs."""
        stop = self.out_features if stop is None else stop
        if self._step is None:
            yield build_weight(self._read, torch.float32), (start, stop)
            return
        most = max(1, PIECE_BYTES * self.out_features // self._read.nbytes)
        size = max(self._step, most // self._step * self._step)
        for first in range(start // self._step * self._step, stop, size):
            last = min(first + size, -(-stop // self._step) * self._step, self.out_features)
            yield self._rows(first, last), (max(start - first, 0), min(stop, last) - first)

    def _rows(self, start: int, stop: int) -> Weight:
        read = self._read
        slots = {slot.leaf: slot for slot in read.slots}
        stored = {
            leaf: _slice(meta, slots[leaf], start, stop) for leaf, meta in read.stored.items()
        }
        weight = read.scheme.build(stored, replace(read.site, out_features=stop - start, parts=1))
        return weight if read.activations is None else read.activations.around(weight, stored)


def _step(read: SiteRead) -> int | None:
    """Of how many rows a part must be a multiple; None if rows are not stored one after another."""
    if read.transform is not None:
        return None
    step = 1
    for slot in read.slots:
        if slot.axes is None:
            return None
        if not any("out" in axis for axis in slot.axes):
            continue
        first, *rest = slot.axes
        name, _, divisor = first.partition("/")
        if name != "out" or any("out" in axis for axis in rest):
            return None
        step = math.lcm(step, int(divisor or 1))
    return step


def _slice(meta: TensorMeta, slot: Slot, start: int, stop: int) -> Tensor:
    if not slot.axes or "out" not in slot.axes[0]:
        return read_tensor(meta)
    share = int(slot.axes[0].partition("/")[2] or 1)
    return read_tensor(meta.rows(start // share, -(-stop // share)))
