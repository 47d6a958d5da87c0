"""The largest products of a row, for who draws a token from the likeliest alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cabochon.nn.softcap import SoftCap

Ids = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32]
Allowed = npt.NDArray[np.bool_]


class Shortlist(Protocol):
    """Products of inputs `[rows, in_features]`, to be looked into row by row."""

    def largest(
        self, row: int, count: int, never: Sequence[int], allowed: Allowed | None
    ) -> tuple[Ids, Numbers]:
        """Columns in rising order, and their products exactly as `linear` has them.

        Among them are the `count` largest and whatever the soft-cap may make equal to one of them,
        of those that are `allowed`, or of all but `never` some. A row is asked for once: what may
        not be drawn is lost.
        """


class Products:
    """A shortlist of products that are all there, `[rows, out_features]`."""

    def __init__(self, products: Tensor, cap: SoftCap) -> None:
        self._products: Numbers = products.float().cpu().numpy()
        self._cap = cap

    def largest(
        self, row: int, count: int, never: Sequence[int], allowed: Allowed | None
    ) -> tuple[Ids, Numbers]:
        products = self._products[row]
        products[list(never)] = -np.inf
        if allowed is not None:
            products[~allowed] = -np.inf
        ids = reaching(products, self._cap.floor(kth_largest(products, count)))
        return ids, products[ids]


def kth_largest(products: Numbers, count: int) -> float:
    """The least of all if there are fewer."""
    count = min(count, len(products))
    return float(products.max() if count == 1 else np.partition(products, -count)[-count])


def reaching(products: Numbers, least: float) -> Ids:
    """Those that are at least so large, and may be drawn."""
    ids = np.flatnonzero(products >= np.float32(least))
    return ids if least > -np.inf else ids[products[ids] > -np.inf]
