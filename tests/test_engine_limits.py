"""What the engine grants, what it counts, and that a fault stays with the request that has it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from conftest import TINY

from cabochon import LLM, SamplingParams
from cabochon.engine.request import Delta, Prompt
from cabochon.engine.scheduler import Scheduled
from cabochon.engine.work import Limits
from cabochon.errors import BusyError, CabochonError, DeadlineError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0.0, ignore_eos=True)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM(TINY, dtype="float32", kv_cache_bytes=8 * 2**20, max_batch=2) as llm:
        yield llm


def idle(llm: LLM) -> bool:
    engine = llm.engine
    return engine.load == 0 and engine.cache.free_pages() == engine.cache.plan.pages


def settled(llm: LLM, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not idle(llm) and time.monotonic() < end:
        time.sleep(0.01)
    return idle(llm)


def prompt(llm: LLM, first: int, length: int = 8) -> Prompt:
    return llm.prompts.raw([2, first, *[350] * (length - 2)])


def test_a_fault_in_a_batch_ends_the_request_that_has_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model raises whenever one request is in the step; the other's answer is as alone."""
    expected = llm.generate(prompt(llm, 300), GREEDY)[0]
    run, sizes = llm.runner.run, []

    def poisoned(cache: Any, step: Sequence[Scheduled], **options: Any) -> Any:
        sizes.append(len(step))
        if any(s.sequence.tokens[1] == 320 and len(s.sequence.tokens) > 10 for s in step):
            raise ArithmeticError("injected")
        return run(cache, step, **options)

    monkeypatch.setattr(llm.runner, "run", poisoned)
    unlucky = llm.stream(prompt(llm, 320), ENDLESS)
    assert llm.generate(prompt(llm, 300), GREEDY)[0] == expected
    with pytest.raises(CabochonError, match="ArithmeticError: injected"):
        list(unlucky)
    assert 2 in sizes
    assert settled(llm)


def test_prompts_that_wait_are_bounded_by_their_tokens(llm: LLM) -> None:
    llm.engine.limits = Limits(waiting_tokens=20)
    running = []
    for _ in range(2):  # each is alone when it comes, and its 30 tokens soon wait no more
        running.append(llm.stream(prompt(llm, 300, 30), ENDLESS))
        next(running[-1])
    waiting = llm.stream(prompt(llm, 300, 12), GREEDY)
    with pytest.raises(BusyError, match="12 tokens of prompts wait already, and 20 may") as busy:
        llm.stream(prompt(llm, 300, 12), GREEDY)
    assert 1 <= busy.value.seconds <= 60
    assert busy.value.http_status == 429
    for stream in running:
        stream.close()
    assert len(list(waiting)) == 12
    assert llm.generate(prompt(llm, 300), GREEDY)
    assert settled(llm)


def test_an_answer_that_takes_too_long_is_ended(llm: LLM) -> None:
    llm.engine.limits = Limits(seconds=0.3)
    streams = [llm.stream(prompt(llm, 300 + i), ENDLESS) for i in range(3)]  # one only waits
    for stream in streams:
        with pytest.raises(DeadlineError, match=r"longer than 0\.3 seconds"):
            list(stream)
    assert settled(llm)
    llm.engine.limits = Limits()
    assert len(llm.generate(prompt(llm, 300), GREEDY)[0].tokens) == 12


def test_what_was_done_is_counted(llm: LLM) -> None:
    llm.generate([prompt(llm, 300), prompt(llm, 310, 20)], GREEDY)
    stats = llm.engine.stats
    assert stats.prefill_tokens == 28
    assert stats.decode_tokens == 2 * 11  # the first token of each comes with its prompt
    assert stats.ended == {"length": 2}
    assert [sum(h.counts) for h in (stats.queue, stats.first_token, stats.interval)] == [2, 2, 22]
    assert (stats.prompt_length.sum, stats.answer_length.sum) == (28, 24)
    assert stats.whole.sum >= stats.prefill.sum + stats.decode.sum > 0
    assert stats.tokens_per_second > 0
    llm.stream(prompt(llm, 300), ENDLESS).close()
    assert settled(llm)
    assert stats.ended["abort"] == 1


def test_a_cancelled_request_gives_its_pages_back_at_once(llm: LLM) -> None:
    """Not when it would have ended, nor when somebody else asks for pages."""
    first = threading.Event()

    def sink(delta: Delta) -> None:
        first.set()

    number = llm.engine.submit(prompt(llm, 300, 200), ENDLESS, sink)
    assert first.wait(10)
    assert not idle(llm)
    llm.engine.cancel(number)
    assert settled(llm, 1.0)


def test_closing_ends_the_templates_process() -> None:
    with LLM(dtype="float32", kv_cache_bytes=8 * 2**20) as llm:
        renderer = llm.prompts.template._renderer
        assert renderer is not None
        process = renderer._process
        assert process.poll() is None
    assert process.poll() is not None
    assert llm.prompts.chat([{"role": "user", "content": "Hello"}]).tokens  # it comes back
    llm.prompts.close()
