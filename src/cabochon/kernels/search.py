"""`Found`: a shortlist that compiled code looks into."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_float, c_int64, pointer
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cabochon.kernels.library import Library, Search, Sketch, threads
from cabochon.nn.shortlist import Allowed, Ids, Numbers
from cabochon.nn.softcap import SoftCap

ROOM = 64  # for those that are found beside as many as are asked for; more is rare


@dataclass(frozen=True, slots=True)
class Nearly:
    """What says how far products are off, and what the true ones are."""

    sketch: Sketch
    widest: tuple[float, float]  # of its margins
    owner: object  # of the memory that the sketch points to


class Found:
    """The largest of `products`, float32 `[rows, out_features]`, which nobody else needs any more.

    Args:
        x: `[rows, in_features]`, to whose dtype the true products are rounded.
        nearly: if `products` are not those.
    """

    def __init__(
        self,
        library: Library,
        products: Tensor,
        x: Tensor,
        cap: SoftCap,
        nearly: Nearly | None = None,
    ) -> None:
        self._library = library
        self._products = products
        self._dtype = x.dtype
        self._x = x.float().contiguous()
        self._cap = cap
        self._nearly = nearly

    def largest(
        self, row: int, count: int, never: Sequence[int], allowed: Allowed | None
    ) -> tuple[Ids, Numbers]:
        columns = self._products.shape[1]
        count = min(count, columns)
        refused = (c_int64 * len(never))(*never)
        allowed = None if allowed is None else np.ascontiguousarray(allowed)
        search = Search(
            products=_row_of(self._products, row),
            x=_row_of(self._x, row),
            never=addressof(refused),
            nevers=len(never),
            allowed=None if allowed is None else allowed.ctypes.data,
            n=columns,
            count=count,
            threads=threads(),
            cap=self._cap.cap or 0.0,
            rounding=0.0 if self._dtype is torch.float32 else torch.finfo(self._dtype).eps,
        )
        if (nearly := self._nearly) is not None:
            search.sketch, search.widest = pointer(nearly.sketch), nearly.widest
        room = count + ROOM
        while True:
            ids, found = (c_int64 * room)(), (c_float * room)()
            search.ids, search.found, search.room = addressof(ids), addressof(found), room
            size = self._library.search(search)
            if size <= room:
                products = np.frombuffer(memoryview(found), np.float32, size)
                return np.frombuffer(memoryview(ids), np.int64, size), self._rounded(products)
            room = size

    def _rounded(self, products: Numbers) -> Numbers:
        if self._dtype is torch.float32:
            return products
        rounded: Numbers = torch.from_numpy(products).to(self._dtype).float().numpy()
        return rounded


def _row_of(rows: Tensor, row: int) -> int:
    """Where a row of floats begins."""
    return rows.data_ptr() + row * rows.shape[1] * rows.element_size()
