"""A head that reads a sketch draws what it would have drawn by all logits, to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from thin import fixture
from torch import Tensor

from cabochon import LLM, SamplingParams
from cabochon.kernels import sketch
from cabochon.kernels.arena import Arena
from cabochon.kernels.library import Library, library
from cabochon.kernels.sketch import SketchedHead, sketchable
from cabochon.nn.softcap import SoftCap
from cabochon.nn.weight import DenseWeight, StoredFloats

KERNELS = library()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="the kernels were not built: no compiler")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROWS, COLUMNS = 1000, 192


@pytest.fixture(params=KERNELS.available() if KERNELS else [])
def kernels(request: pytest.FixtureRequest) -> Iterator[Library]:
    assert KERNELS is not None
    before = KERNELS.isa
    KERNELS.choose(request.param)
    yield KERNELS
    KERNELS.choose(before)


def matrices(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Ordinary rows, outliers, rows of zeros, tiny and large ones, one group that drowns others."""
    made = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3))
    yield "ordinary", (made * 0.02).to(dtype)
    heavy = made.clone()
    heavy[::3, 5] *= 300
    heavy[7:90] = 0
    heavy[100:140] *= 1e-6
    heavy[200:230, :64] *= 10
    yield "heavy", heavy.to(dtype)
    whole = (made[:1] * 10).round().clamp(-30, 30) + made.round().clamp(-1, 1) * (made.abs() > 2)
    whole[:, ::64] = 31
    yield "alike, and told exactly by a sketch", whole.to(dtype)
    yield "nothing", torch.zeros(ROWS, COLUMNS, dtype=dtype)
    yield "alike", (made[:1] + made * 1e-4).to(dtype)
    yield (
        "subnormal",
        (made * 1e-7).to(dtype) if dtype is torch.float16 else (made * 1e-37).to(dtype),
    )


def inputs() -> Iterator[Tensor]:
    x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(4))
    yield x
    x[1, 3] = 1e4
    x[2] = 0
    x[3] *= 1e-6
    x[4] = x[4].abs() * 100
    yield x


@pytest.mark.parametrize("name", TYPES)
def test_no_product_is_farther_off_than_the_margin(kernels: Library, name: str) -> None:
    """In float64, by the sketch's own entries as the margin's definition has them."""
    for _, data in matrices(TYPES[name]):
        head = SketchedHead(kernels, DenseWeight(data.clone()), arena=Arena(kernels))
        for x in inputs():
            near = head.sketch.linear(x).double()
            true = x.double() @ data.double().T
            allowed = head.margins.double() * torch.linalg.vector_norm(x.double(), dim=-1)[:, None]
            assert bool(((near - true).abs() <= allowed + 1e-37).all())


def test_margins_are_not_loose(kernels: Library) -> None:
    """Or all tokens would be multiplied with: 6 bits leave a 40th of an ordinary row."""
    data = dict(matrices(torch.bfloat16))["ordinary"]
    head = SketchedHead(kernels, DenseWeight(data), arena=Arena(kernels))
    assert bool((head.margins < 0.04 * data.float().norm(dim=1)).all())


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("count", [1, 3, 64])
def test_the_largest_are_there_to_the_bit(kernels: Library, name: str, count: int) -> None:
    allowed = np.random.default_rng(2).random(ROWS) < 0.3
    never = [0, 17, 999]
    for what, data in matrices(TYPES[name]):
        head = SketchedHead(kernels, DenseWeight(data), arena=Arena(kernels))
        for x in inputs():
            whole = head.linear(x).numpy()
            shortlist = head.shortlist(x, SoftCap(None))
            for row in range(len(x)):
                for mask in (None, allowed):
                    ids, products = shortlist.largest(row, count, never, mask)
                    assert (np.diff(ids) > 0).all()
                    assert np.array_equal(products, whole[row][ids]), what
                    may = np.ones(ROWS, bool) if mask is None else mask.copy()
                    may[never] = False
                    assert may[ids].all()
                    least = np.sort(whole[row][may])[-count]
                    missed = set(np.flatnonzero(may & (whole[row] >= least))) - set(ids.tolist())
                    assert not missed, what


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("large", [30, 0.003])
def test_rounded_products_that_a_soft_cap_makes_equal_are_all_there(
    kernels: Library, count: int, large: float
) -> None:
    """As a model that computes in bfloat16 has them; many are equal then, most at the cap's end."""
    cap = 30.0
    for what, data in matrices(torch.bfloat16):
        head = SketchedHead(kernels, DenseWeight(data), arena=Arena(kernels))
        for x in inputs():
            rounded = (x * large).bfloat16()
            whole = head.linear(rounded).float()
            capped = (torch.tanh(whole / cap) * cap).numpy()
            shortlist = head.shortlist(rounded, SoftCap(cap))
            for row in range(len(x)):
                ids, products = shortlist.largest(row, count, [], None)
                assert np.array_equal(products, whole.numpy()[row][ids]), what
                least = np.sort(capped[row])[-count]
                assert not set(np.flatnonzero(capped[row] >= least)) - set(ids.tolist()), what


def test_few_are_looked_at(kernels: Library) -> None:
    data = dict(matrices(torch.bfloat16))["ordinary"]
    shortlist = SketchedHead(kernels, DenseWeight(data), arena=Arena(kernels)).shortlist(
        next(inputs()), SoftCap(None)
    )
    assert all(len(shortlist.largest(row, 1, [], None)[0]) < ROWS // 50 for row in range(5))


def test_which_heads_have_one() -> None:
    large = torch.empty(1 << 18, 64, dtype=torch.bfloat16)
    assert sketchable(StoredFloats(data=large))
    assert not sketchable(StoredFloats(data=large[:1000]))
    assert not sketchable(StoredFloats(data=large, scales=torch.ones(1, 1)))
    assert not sketchable(StoredFloats(data=torch.empty(1 << 18, 65)))
    assert not sketchable(StoredFloats(data=large.view(torch.uint8)))


@pytest.fixture(params=["e2b-w4a16", "12b-w4a16", "26b-w4a16", "e2b-bf16"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[LLM]]:
    """A model whose head has a sketch, and the same one without."""
    folder = fixture(request.param)
    with LLM(folder) as plain:
        monkeypatch.setattr(sketch, "LEAST", 0)
        with LLM(folder) as sketched:
            found = [m for m in sketched.runner.model.modules() if isinstance(m, SketchedHead)]
            assert len(found) == 1
            yield [sketched, plain]


def test_answers_are_the_same(pair: list[LLM]) -> None:
    prompts = [[2, *(300 + seed + i % 5 for i in range(30))] for seed in range(3)]
    for params in (
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1, "top_k": 64, "top_p": 0.95},
        {"temperature": 0.7, "seed": 2, "top_k": 3, "min_p": 0.1},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.0, "logprobs": 2, "presence_penalty": 0.5},
    ):
        asked = SamplingParams(max_tokens=40, ignore_eos=True, **params)  # type: ignore[arg-type]
        sketched, plain = (llm.generate(prompts, asked) for llm in pair)
        assert sketched == plain, params


def test_requests_of_both_kinds_go_together(pair: list[LLM]) -> None:
    """Some need all logits and some the likeliest, in the same steps."""
    prompts = [[2, *range(300 + i, 320 + i)] for i in range(4)]  # pages found make other sums
    asked = [
        SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, max_tokens=25, ignore_eos=True),
        SamplingParams(temperature=0.0, logprobs=1, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=6, top_k=20, max_tokens=28, ignore_eos=True),
    ]

    def told(llm: LLM) -> list[object]:
        each = zip(prompts, asked, strict=True)
        streams = [llm.stream(llm.prompts.raw(prompt), params) for prompt, params in each]
        return [[(d.tokens, d.logprobs) for d in stream] for stream in streams]

    assert told(pair[0]) == told(pair[1])
