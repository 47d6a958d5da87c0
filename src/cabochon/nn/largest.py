"""Finding the largest of very many numbers without putting them in order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_RUN = 64


def reached(values: npt.NDArray[np.float32], count: int) -> np.float32:
    """A number that at least `count` of `values` reach, and few more: none is above the count-th.

    The count-th of the largest of every 64 is such a number, and found in an eighth of the time.
    """
    whole = len(values) // _RUN * _RUN
    tops = values[:whole].reshape(-1, _RUN).max(axis=1)
    if count <= len(tops) // 4:
        values = tops
    return np.float32(np.partition(values, -count)[-count])
