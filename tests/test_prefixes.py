"""What two requests have in common is computed once, and nobody can tell but by the clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, TINY, noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cabochon import LLM, SamplingParams
from cabochon.engine.cache import PAGE
from cabochon.engine.pool import Named, PagePool
from cabochon.engine.request import Delta, Prompt
from cabochon.errors import CabochonError
from cabochon.gemma4.pictures import Picture

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(TINY, dtype="float32", kv_cache_bytes=16 * 2**20, max_batch=4) as llm:
        yield llm


def idle(llm: LLM) -> bool:
    engine = llm.engine
    return engine.load == 0 and engine.cache.free_pages() == engine.cache.plan.pages


def ask(llm: LLM, prompt: Prompt, salt: bytes = b"") -> tuple[tuple[int, ...], int]:
    """The answer's tokens, and how many of the prompt's were there already."""
    deltas: list[Delta] = []
    ended = threading.Event()

    def sink(delta: Delta) -> None:
        deltas.append(delta)
        if delta.last:
            ended.set()

    llm.engine.submit(prompt, GREEDY, sink, salt=salt)
    assert ended.wait(60)
    if deltas[-1].error:
        raise deltas[-1].error
    return tuple(t for d in deltas for t in d.tokens), max(d.cached_tokens for d in deltas)


def random_prompt(llm: LLM, length: int, seed: int, picture: int | None = None) -> Prompt:
    tokens = [2, *np.random.default_rng(seed).integers(280, 384, length - 1).tolist()]
    if picture is None:
        return llm.prompts.raw(tokens)
    middle = length // 2
    tokens[middle] = llm.config.tokens.image
    return llm.prompts.raw(tokens, [noise(50, 40, seed=picture)])


@pytest.mark.parametrize("member", ["e2b", "12b", "26b", "31b"])
@pytest.mark.parametrize("picture", [None, 1])
def test_a_repeated_prompt_is_answered_alike(
    family: Callable[[str], LLM], member: str, picture: int | None
) -> None:
    """Longer than any window. Of a prompt nothing but its last token is computed again, unless a
    picture reaches into the page that it stands in."""
    llm = family(member)
    prompt = random_prompt(llm, 150, 100 if picture is None else 200, picture)
    salt = repr(picture).encode()  # all prompts begin with the same token
    cold, nothing = ask(llm, prompt, salt)
    warm, found = ask(llm, prompt, salt)
    assert (cold, nothing) == (warm, 0)
    assert found == len(prompt.tokens) - 1
    assert idle(llm)


@pytest.mark.parametrize("alike", [1, 15, 16, 17, 40, 95, 99])
def test_what_differs_within_a_page_is_found_as_far_as_it_is_alike(llm: LLM, alike: int) -> None:
    """The beginning of a page that goes on otherwise is copied, and both stay what they are."""
    first, other = (random_prompt(llm, 100, seed).tokens for seed in (8, 9))
    mixed = Prompt(
        (
            *first[:alike],
            *(
                t if t != f else 281 + (f - 280) % 90
                for t, f in zip(other[alike:], first[alike:], strict=True)
            ),
        )
    )
    alone = [ask(llm, prompt, b"alone")[0] for prompt in (mixed, Prompt(first))]
    ask(llm, Prompt(first))
    assert ask(llm, mixed) == (alone[0], alike)
    assert ask(llm, mixed) == (alone[0], 99)
    assert ask(llm, Prompt(first)) == (alone[1], 99)
    assert idle(llm)


def test_a_conversation_goes_on_where_it_was(llm: LLM) -> None:
    """The answer of the turn before counts, too; windows of the past are not needed any more."""
    prompt = random_prompt(llm, 200, 1)
    answer, _ = ask(llm, prompt)
    longer = Prompt((*prompt.tokens, *answer, *range(300, 330)))
    warm, found = ask(llm, longer)
    assert found >= len(prompt.tokens) + len(answer) - PAGE - 1
    with LLM(TINY, dtype="float32") as other:
        assert ask(other, longer) == (warm, 0)


def test_what_begins_alike_is_shared_while_both_run(llm: LLM) -> None:
    common = random_prompt(llm, 96, 2).tokens
    first = llm.stream(Prompt((*common, 300, 301)), replace(GREEDY, max_tokens=None))
    next(first)
    before = llm.engine.cache.free_pages()
    expected = [ask(llm, Prompt((*common, 340 + i)), salt=b"alone")[0] for i in range(3)]
    shared = [ask(llm, Prompt((*common, 340 + i))) for i in range(3)]
    assert shared == [(tokens, 96) for tokens in expected]
    assert llm.engine.load == 1
    first.close()
    llm.generate([2, 300], GREEDY)
    assert idle(llm)
    assert before != llm.engine.cache.free_pages()


def test_a_picture_is_known_by_what_it_shows(llm: LLM) -> None:
    one, other = (random_prompt(llm, 100, 3, picture) for picture in (1, 2))
    assert one.tokens == other.tokens
    expected, _ = ask(llm, other, salt=b"alone")
    ask(llm, one)
    answer, found = ask(llm, other)
    assert answer == expected
    assert found <= other.media[0][0]  # what stands before it is the same


def test_who_asks_with_another_key_finds_nothing(llm: LLM) -> None:
    prompt = random_prompt(llm, 100, 4)
    assert ask(llm, prompt, b"one")[1] == 0
    assert ask(llm, prompt, b"two")[1] == 0
    assert ask(llm, prompt, b"one")[1] == 99


def test_what_is_no_number_is_not_passed_on(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(llm, 100, 5)
    run = llm.runner.run

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        with torch.inference_mode():
            return run(*args, **options) * torch.nan

    with monkeypatch.context() as patch:
        patch.setattr(llm.runner, "run", poisoned)
        with pytest.raises(CabochonError, match="not finite"):
            ask(llm, prompt)
    assert ask(llm, prompt)[1] == 0
    assert ask(llm, prompt)[1] == 99


def test_nothing_is_left_of_a_picture_that_is_no_numbers(llm: LLM) -> None:
    """It spoils what stands before it in the same step, even in pages that no query sees again."""
    one, other, broken = (random_prompt(llm, 300, 6, picture) for picture in (1, 2, 3))
    picture = broken.media[0][1]
    assert isinstance(picture, Picture)
    picture.patches[:] = np.nan
    alone = [ask(llm, prompt, b"alone")[0] for prompt in (one, other)]
    with pytest.raises(CabochonError, match="not finite"):
        ask(llm, broken)
    assert [ask(llm, prompt)[0] for prompt in (one, other)] == alone


@pytest.mark.parametrize("member", ["e2b", "26b"])
def test_nothing_is_mixed_up_when_there_is_too_little_room(
    family: Callable[[str], LLM], member: str
) -> None:
    """Many requests with few beginnings, some left early, in a cache that forgets all the time."""
    roomy = family(member)
    rng = np.random.default_rng(6)
    beginnings = [random_prompt(roomy, length, length) for length in (30, 64, 100, 140)]
    many = []
    for _ in range(40):
        start = beginnings[rng.integers(4)].tokens
        cut = int(rng.integers(1, len(start)))
        many.append(Prompt((*start[:cut], *rng.integers(280, 384, rng.integers(1, 40)).tolist())))
    expected = roomy.generate(many, GREEDY)
    options: dict[str, Any] = {"kv_cache_bytes": 600_000, "prefill_chunk": 48, "max_batch": 5}
    with LLM(FIXTURES / f"{member}-bf16", dtype="float32", **options) as cramped:
        left = [cramped.stream(prompt, GREEDY) for prompt in many[::7]]
        answers = cramped.generate(many[:20], GREEDY)
        for stream in left:
            stream.close()
        answers += cramped.generate(many[20:], GREEDY)
        assert answers == expected
        assert cramped.engine.scheduler.prefix_hits > 0
        assert idle(cramped)


Action = tuple[str, int]
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["take", "share", "drop", "name", "forget"]), st.integers(0, 30)),
    max_size=80,
)


@given(actions=ACTIONS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_pool_never_gives_away_what_is_held(actions: list[Action]) -> None:
    """Against a pool that only counts: who holds what, and what names mean."""
    pool = PagePool(5)
    held: list[int] = []
    content: dict[int, bytes | None] = {}  # of each page that was ever taken
    for what, i in actions:
        if what == "take" and pool.free:
            page = pool.take()
            assert page not in held
            held.append(page)
            content[page] = None
        elif what == "name" and held:
            page = held[i % len(held)]
            if content[page] is None and not pool.has(bytes([i])):
                pool.name(page, Named(bytes([i]), b"", (i,)))
                content[page] = bytes([i])
        elif what == "share" and pool.has(bytes([i])):
            page = pool.page(bytes([i]))
            pool.share(page)
            assert content[page] == bytes([i])
            held.append(page)
        elif what == "forget" and held:
            page = held[i % len(held)]
            pool.forget(page)
            content[page] = None
        elif what == "drop" and held:
            pool.drop(held.pop(i % len(held)))
        assert pool.free == 5 - len(set(held))
