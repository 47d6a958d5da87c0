"""The likeliest of many products, found without sorting them, are those that numpy sorts first."""

from __future__ import annotations

import numpy as np
import pytest

from cabochon.nn.shortlist import Numbers, kth_largest, reaching

RANDOM = np.random.default_rng(5)


def drawn(size: int) -> Numbers:
    return RANDOM.standard_normal(size).astype(np.float32)


KINDS = {
    "ordinary": drawn,
    "in rising order": lambda size: np.sort(drawn(size)),
    "mostly equal": lambda size: np.round(drawn(size)),
    "nearly none may be drawn": lambda size: np.where(drawn(size) > 2.5, np.float32(1), -np.inf),
    "none may be drawn": lambda size: np.full(size, -np.inf),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 5, 255, 256, 2048, 5000])
@pytest.mark.parametrize("count", [1, 2, 8, 64, 3000])
def test_the_likeliest_are_found(kind: str, size: int, count: int) -> None:
    products = KINDS[kind](size).astype(np.float32)
    least = np.sort(products)[-min(count, size)]
    found = kth_largest(products, count)
    assert found == least
    assert np.array_equal(
        reaching(products, found), [i for i in range(size) if -np.inf < products[i] >= least]
    )


@pytest.mark.parametrize("count", [1, 3])
def test_of_what_is_no_number_nothing_is_found(count: int) -> None:
    products = drawn(1024)
    products[[3, 300, 600, 900]] = np.nan
    assert np.isnan(kth_largest(products, count))
    assert not len(reaching(products, np.nan))
