"""The largest products of a row, for who draws a token from the likeliest alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

_RUN = 256  # products that are looked at together first

Ids = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float32]
Allowed = npt.NDArray[np.bool_]

# The least number that may become equal to a given one by what is done to products later.
Floor = Callable[[float], float]


class Shortlist(Protocol):
    """Products of inputs `[rows, in_features]`, to be looked into row by row."""

    def largest(
        self, row: int, count: int, never: Sequence[int], allowed: Allowed | None
    ) -> tuple[Ids, Numbers]:
        """Columns in rising order, and their products exactly as `linear` has them.

        Among them are the `count` largest and whatever may become equal to one of them, of those
        that are `allowed`, or of all but `never` some.
        """


class Products:
    """A shortlist of products that are all there, `[rows, out_features]`."""

    def __init__(self, products: Tensor, floor: Floor) -> None:
        self._products: Numbers = products.float().cpu().numpy()
        self._floor = floor

    def largest(
        self, row: int, count: int, never: Sequence[int], allowed: Allowed | None
    ) -> tuple[Ids, Numbers]:
        products = usable(self._products[row], never, allowed)
        ids = reaching(products, self._floor(kth_largest(products, count)))
        return ids, products[ids]


def usable(products: Numbers, never: Sequence[int], allowed: Allowed | None) -> Numbers:
    """`products`, of which those that may not be drawn are now -inf."""
    products[list(never)] = -np.inf
    return products if allowed is None else np.where(allowed, products, np.float32(-np.inf))


def kth_largest(products: Numbers, count: int) -> float:
    """The least of all if there are fewer; of none, -inf."""
    if not len(products):
        return -np.inf
    runs = len(products) // _RUN
    if 1 < count <= runs:
        # As many runs have a number that is no less than the least of these: none below it counts.
        largest = products[: runs * _RUN].reshape(runs, _RUN).max(axis=1)
        products = products[~(products < np.partition(largest, -count)[-count])]
    count = min(count, len(products))
    return float(products.max() if count == 1 else np.partition(products, -count)[-count])


def reaching(products: Numbers, least: float) -> Ids:
    """Those that are at least so large, and may be drawn."""
    ids = np.flatnonzero(products >= np.float32(least))
    return ids if least > -np.inf else ids[products[ids] > -np.inf]
