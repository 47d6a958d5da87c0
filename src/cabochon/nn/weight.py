"""`Weight`: a matrix in its stored bits, and `DenseWeight`, the one that is stored as floats.

A weight has no dtype to ask for. Whoever wants numbers says in which dtype; products come back in
the dtype of the activation. This is what keeps a storage type from becoming a compute type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cabochon.nn.layout import Layout
from cabochon.nn.shortlist import Products, Shortlist
from cabochon.nn.softcap import SoftCap

TILE_BYTES = 8 << 20  # of a tile turned into the compute dtype, so that no dense copy ever exists


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """What `dense` computes, said so that a kernel can compute it: codes, and what they count.

    An entry is `(code - zero) * scale`, or `code * scale - minimum`, or `values[code] * scale`.
    The scale of a group is `scales`, or `levels[scales]`, or `shared * scales`.
    """

    octets: Tensor  # uint8 [out, n], the codes of a row as they are stored
    layout: Layout  # where in them; its codes have 2, 3, 4, 5, 6 or 8 bits
    group: int  # entries of a row that share a scale; the last group may be cut short
    scales: Tensor  # [out, groups] float16, bfloat16, float32; of `levels` or `shared`: bytes
    levels: Tensor | None = None  # float32 [256]
    shared: Tensor | None = None  # float16 [out, groups / n]
    zero: int = 0
    zeros: Tensor | None = None  # uint8 [out, groups], instead of `zero`
    minima: Tensor | None = None  # float16 or float32 [out, groups]; of `shared_minima`: uint8
    shared_minima: Tensor | None = None  # float16 like `shared`
    values: tuple[float, ...] | None = None  # of the 16 codes
    rounded: torch.dtype = torch.float32  # what an entry is rounded to, once, in the end
    exact: bool = True  # or `dense` rounds on the way too, which is not said here

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.layout.bits


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFloats:
    """The same for entries that are floats: what is stored, times a scale."""

    data: Tensor  # [out, in] bfloat16, float16, float32; float8_e4m3fn as uint8
    scales: Tensor | None = None  # float32 [ceil(out / scale_rows), ceil(in / scale_columns)]
    scale_rows: int = 1
    scale_columns: int | None = None  # None: all
    rounded: torch.dtype = torch.float32  # what products with scales are rounded to


class Weight(nn.Module):
    """A matrix of logical shape `[out_features, in_features]`.

    `dense` is the definition. `linear` and `rows` agree with it exactly, up to the order of sums.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` in `dtype`: `[stop - start, in_features]`."""
        raise NotImplementedError

    def description(self) -> Coded | StoredFloats | None:
        """How a kernel may compute it; None: only as this class does."""
        return None

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `ids` (any shape) in `dtype`: `[*ids.shape, in_features]`."""
        raise NotImplementedError

    def shortlist(self, x: Tensor, cap: SoftCap) -> Shortlist:
        """`x @ W.T` for those who want the largest products of each row alone, through a cap."""
        return Products(self.linear(x), cap)

    def among(self, x: Tensor, ids: Tensor) -> Tensor:
        """The products of each of `x [n, in_features]` with its own rows `ids [n, m]`: `[n, m]`."""
        return (self.rows(ids, x.dtype) @ x[..., None]).squeeze(-1)

    def nearly(self, x: Tensor) -> Tensor:
        """`x @ W.T` for those who only guess."""
        return self.linear(x)

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """`x @ W[start:stop].T`: `[..., in_features]` to `[..., stop - start]`, in `x`'s dtype."""
        stop = self.out_features if stop is None else stop
        step = max(1, TILE_BYTES // (self.in_features * x.element_size()))
        if step >= stop - start:
            return F.linear(x, self.dense(x.dtype, start, stop))
        y = x.new_empty(*x.shape[:-1], stop - start)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            y[..., first - start : last - start] = F.linear(x, self.dense(x.dtype, first, last))
        return y


class DenseWeight(Weight):
    """A matrix stored as bfloat16, float16 or float32, and kept so."""

    def __init__(self, data: Tensor) -> None:
        super().__init__(*data.shape)
        self.register_buffer("data", data)

    data: Tensor  # [out_features, in_features]

    def description(self) -> StoredFloats:
        return StoredFloats(data=self.data)

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return self.data[start:stop].to(dtype)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.embedding(self.data, ids).to(dtype)


class Stack(Weight):
    """Matrices of equal size, one below the other: experts that are stored one by one."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        rows = parts[0].out_features
        assert all(part.out_features == rows for part in parts)
        super().__init__(rows * len(parts), parts[0].in_features)
        self.parts = nn.ModuleList(parts)
        self.part_rows = rows

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        return torch.cat([p.dense(dtype, *rows) for p, rows in self._covering(start, stop)])

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return torch.cat([p.linear(x, *rows) for p, rows in self._covering(start, stop)], dim=-1)

    def _covering(self, start: int, stop: int | None) -> Iterator[tuple[Weight, tuple[int, int]]]:
        """The parts that hold rows `start` to `stop`, and which of their own rows these are."""
        stop = self.out_features if stop is None else stop
        for index in range(start // self.part_rows, -(-stop // self.part_rows)):
            first = index * self.part_rows
            part = self.parts[index]
            assert isinstance(part, Weight)
            yield part, (max(start - first, 0), min(stop - first, self.part_rows))
