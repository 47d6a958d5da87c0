"""The likeliest of many products, found without sorting them, are those that numpy sorts first."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from cabochon.kernels.library import library
from cabochon.kernels.search import Found
from cabochon.nn.shortlist import Numbers, Products, Shortlist
from cabochon.nn.softcap import SoftCap

KERNELS = library()
RANDOM = np.random.default_rng(5)

Made = Callable[[Tensor, SoftCap], Shortlist]


@pytest.fixture(params=["numpy", *(KERNELS.available() if KERNELS else [])])
def made(request: pytest.FixtureRequest) -> Iterator[Made]:
    """What makes a shortlist of products."""
    if request.param == "numpy":
        yield Products
        return
    assert KERNELS is not None
    before, kernels = KERNELS.isa, KERNELS
    KERNELS.choose(request.param)
    yield lambda products, cap: Found(kernels, products, torch.zeros(len(products), 1), cap)
    KERNELS.choose(before)


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
@pytest.mark.parametrize("size", [1, 5, 255, 256, 2048, 5000, 40_001])
def test_the_likeliest_are_found(made: Made, kind: str, size: int) -> None:
    rows = np.stack([KINDS[kind](size).astype(np.float32) for _ in range(5)])
    shortlist = made(torch.from_numpy(rows.copy()), SoftCap(None))
    for row, count in enumerate((1, 2, 8, 64, 3000)):
        least = np.sort(rows[row])[-min(count, size)]
        expected = np.flatnonzero((rows[row] >= least) & (rows[row] > -np.inf))
        ids, products = shortlist.largest(row, count, [], None)
        assert np.array_equal(ids, expected)
        assert np.array_equal(products, rows[row][expected])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
def test_of_those_that_may_be_drawn(made: Made, share: float) -> None:
    rows = np.stack([drawn(5000) for _ in range(3)])
    shortlist = made(torch.from_numpy(rows.copy()), SoftCap(None))
    may = RANDOM.random(5000) < share
    never = [int(rows[0].argmax()), 4999]
    open_ = may.copy()
    open_[never] = False
    for row, count in enumerate((1, 8, 64)):
        ids, products = shortlist.largest(row, count, never, may)
        order = np.flatnonzero(open_)[np.argsort(rows[row][open_])[-count:]]
        assert np.array_equal(ids, np.sort(order))
        assert np.array_equal(products, rows[row][ids])


def test_more_than_there_are_need_no_more_room(made: Made) -> None:
    """`top_k` may be any number below 2**31: room for so many would be 25 GB."""
    rows = drawn(3000)[None]
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        ids, products = made(torch.from_numpy(rows.copy()), SoftCap(None)).largest(
            0, 2**31 - 1, [], None
        )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert np.array_equal(ids, np.arange(3000))
    assert np.array_equal(products, rows[0])


@pytest.mark.skipif(KERNELS is None, reason="no C++ compiler where it was installed")
def test_compiled_code_writes_to_no_column_that_is_not_there() -> None:
    assert KERNELS is not None
    room = torch.from_numpy(np.stack([drawn(300) for _ in range(3)]))
    before = room.clone()
    found = Found(KERNELS, room[1:2], torch.zeros(1, 1), SoftCap(None))
    found.largest(0, 1, [-1, 300, 301], None)
    assert torch.equal(room, before)


@pytest.mark.parametrize("count", [1, 3])
def test_what_is_no_number_is_never_found(made: Made, count: int) -> None:
    products = drawn(1024)
    products[[3, 300, 600, 900]] = np.nan
    ids, found = made(torch.from_numpy(products[None].copy()), SoftCap(None)).largest(
        0, count, [], None
    )
    assert np.isfinite(found).all()
    assert not set(ids.tolist()) & {3, 300, 600, 900}


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0, 400.0, 3000.0])
def test_what_the_soft_cap_makes_equal_is_not_lost(made: Made, scale: float) -> None:
    """Near its ends it rounds different products to one logit, of which the first is taken."""
    cap, generator = SoftCap(30.0), torch.Generator().manual_seed(7)
    for _ in range(20):
        products = torch.randn(1, 500, generator=generator) * scale
        capped = cap(products)[0].numpy()
        for count in (1, 5, 64):
            ids, found = made(products.clone(), cap).largest(0, count, [], None)
            least = np.sort(capped)[-count]
            assert set(np.flatnonzero(capped >= least)) <= set(ids.tolist())
            assert np.array_equal(cap(torch.from_numpy(found.copy())).numpy(), capped[ids])
            assert len(ids) < 2 * count + 5 or scale > 50
