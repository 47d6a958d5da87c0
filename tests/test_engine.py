"""The engine: what runs together equals what runs alone, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES, TINY, noise
from reference import greedy

from cabochon import LLM, SamplingParams
from cabochon.engine.cache import PAGE, CachePlan, cache_groups
from cabochon.engine.request import Completion, Delta, Prompt
from cabochon.engine.sampler import Choices, Sampling, sample
from cabochon.errors import CabochonError, RequestError, ResourceError
from cabochon.gemma4.pictures import Picture

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


def prompts(llm: LLM, count: int) -> list[Prompt]:
    """Random prompts of 3 to 130 tokens; every fourth has a picture."""
    rng = np.random.default_rng(7)
    made = []
    for i in range(count):
        tokens = [2, *rng.integers(280, 384, rng.integers(2, 130)).tolist()]
        pictures = [noise(40 + 9 * i, 50, seed=i)] if i % 4 == 0 else []
        tokens += [llm.config.tokens.image] * len(pictures)
        made.append(llm.prompts.raw(tokens, pictures))
    return made


@pytest.fixture(scope="module")
def alone(tiny: LLM) -> list[Completion]:
    return [tiny.generate(prompt, GREEDY)[0] for prompt in prompts(tiny, 12)]


def idle(llm: LLM) -> bool:
    """Whether no request is left and every page is free."""
    engine = llm.engine
    return engine.load == 0 and engine.cache.free_pages() == engine.cache.plan.pages


def test_together_equals_alone(tiny: LLM, alone: list[Completion]) -> None:
    assert tiny.generate(prompts(tiny, 12), GREEDY) == alone
    assert idle(tiny)


def test_small_chunks_equal_large_ones(alone: list[Completion]) -> None:
    with LLM(TINY, dtype="float32", prefill_chunk=16, max_batch=5) as llm:
        assert llm.generate(prompts(llm, 12), GREEDY) == alone


@pytest.fixture
def cramped() -> Iterator[LLM]:
    """Room for little more than one of the prompts, so that sequences are put off and redone."""
    with LLM(TINY, dtype="float32", kv_cache_bytes=150_000, prefill_chunk=16, max_batch=4) as llm:
        yield llm


def test_out_of_pages_nobody_dies(cramped: LLM, alone: list[Completion]) -> None:
    redone = []
    scheduler = cramped.engine.scheduler
    preempt = scheduler._preempt
    scheduler._preempt = lambda sequence: (redone.append(sequence), preempt(sequence))[1]  # type: ignore[method-assign]
    assert cramped.max_context < 2 * 240
    assert cramped.generate(prompts(cramped, 12), GREEDY) == alone
    assert redone
    assert idle(cramped)


def test_pages_behind_the_window_are_freed(tiny: LLM) -> None:
    held = []
    cache = tiny.engine.cache
    sliding = next(i for i, g in enumerate(cache.plan.groups) if g.window is not None)
    window = cache.plan.groups[sliding].window
    assert window is not None
    params = SamplingParams(temperature=0.0, max_tokens=20 * window, ignore_eos=True)
    for _ in tiny.stream(tiny.prompts.raw([2, 300]), params):
        held.append(cache.plan.pages[sliding] - cache.free_pages()[sliding])
    assert max(held) <= window // PAGE + 2
    assert idle(tiny)


def test_long_decoding_matches_the_reference(tiny: LLM, reference: object) -> None:
    """Decoding far past the window, over pages that were freed and taken again."""
    prompt = tiny.prompts.raw([2, 4, *range(300, 310)])
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    assert list(tiny.generate(prompt, params)[0].tokens) == greedy(reference, prompt, 200)


def test_closing_a_stream_cancels(tiny: LLM) -> None:
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    stream = tiny.stream(tiny.prompts.raw([2, 300, 301]), params)
    next(stream)
    stream.close()
    tiny.generate([2, 300], SamplingParams(max_tokens=1))  # the inbox is read in order
    assert idle(tiny)
    assert list(stream) == []


def test_ends(tiny: LLM) -> None:
    free = tiny.generate([2, 300, 301], GREEDY)[0]
    assert free.finish_reason == "length"
    assert len(free.tokens) == 40
    params = SamplingParams(temperature=0.0, stop_token_ids=(free.tokens[5],))
    ended = tiny.generate([2, 300, 301], params)[0]
    first = free.tokens.index(free.tokens[5])
    assert ended.tokens == free.tokens[: first + 1]
    assert ended.finish_reason == "stop"


def test_a_stop_string_ends_and_is_cut(tiny: LLM) -> None:
    free = tiny.generate([2, 300, 301], GREEDY)[0].text
    stop = free[len(free) // 2 :][:3]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=(stop,))
    ended = tiny.generate([2, 300, 301], params)[0]
    assert ended.text == free[: free.index(stop)]
    assert ended.finish_reason == "stop"


def test_the_context_is_a_limit(cramped: LLM) -> None:
    room = 5
    tokens = [2] + [300] * (cramped.max_context - room - 1)
    answer = cramped.generate(tokens, SamplingParams(temperature=0.0, ignore_eos=True))[0]
    assert (len(answer.tokens), answer.finish_reason) == (room, "length")
    with pytest.raises(RequestError, match=f"context holds {cramped.max_context}"):
        cramped.generate([2] * cramped.max_context)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "empty"), ([2, 384], "0 to 383"), ([2, -1], "0 to 383")],
)
def test_refused_prompts(tiny: LLM, tokens: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny.generate(Prompt(tuple(tokens)))
    assert idle(tiny)


def test_a_request_that_fails_fails_alone(tiny: LLM, alone: list[Completion]) -> None:
    """A picture of no numbers makes logits of no numbers, for its own request only."""
    many = prompts(tiny, 3)
    picture = many[0].media[0][1]
    assert isinstance(picture, Picture)
    picture.patches[:] = np.nan
    outcome: dict[int, list[Delta]] = {i: [] for i in range(3)}
    ended = [threading.Event() for _ in many]

    def sink(i: int, delta: Delta) -> None:
        outcome[i].append(delta)
        if delta.last:
            ended[i].set()

    for i, prompt in enumerate(many):
        tiny.engine.submit(prompt, GREEDY, lambda delta, i=i: sink(i, delta))  # type: ignore[misc]
    assert all(event.wait(30) for event in ended)
    assert isinstance(outcome[0][-1].error, CabochonError)
    assert "not finite" in str(outcome[0][-1].error)
    for i in (1, 2):
        assert tuple(t for delta in outcome[i] for t in delta.tokens) == alone[i].tokens
    assert idle(tiny)


def test_the_engine_survives_its_own_faults(
    tiny: LLM, alone: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs gets an error, wherever the fault lies, and the next request is answered."""
    prompt = prompts(tiny, 2)[1]

    def fail(*_: object) -> None:
        raise ArithmeticError("injected")

    for broken in ((tiny.engine.scheduler, "schedule"), (tiny.runner, "run")):
        with monkeypatch.context() as patch:
            patch.setattr(*broken, fail)
            with pytest.raises(CabochonError, match="ArithmeticError: injected"):
                tiny.generate(prompt, GREEDY)
        assert idle(tiny)
        assert tiny.generate(prompt, GREEDY)[0] == alone[1]
    assert tiny.engine.alive


def test_a_sink_that_raises_is_called_no_more(tiny: LLM, alone: list[Completion]) -> None:
    calls = []

    def broken(delta: Delta) -> None:
        calls.append(delta)
        raise ValueError("a client's own mistake")

    many = prompts(tiny, 2)
    tiny.engine.submit(many[0], GREEDY, broken)
    assert tiny.generate(many[1], GREEDY)[0] == alone[1]
    assert len(calls) == 1
    assert idle(tiny)


def test_a_token_that_cannot_be_drawn_ends_one_request(
    tiny: LLM, alone: list[Completion], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choosy(choices: Choices, row: Sampling) -> int:
        if row.params.seed == 13:
            raise ArithmeticError("injected")
        return sample(choices, row)

    many = prompts(tiny, 2)
    monkeypatch.setattr("cabochon.engine.work.sample", choosy)
    unlucky = tiny.stream(many[0], replace(GREEDY, seed=13))
    assert tiny.generate(many[1], GREEDY)[0] == alone[1]
    with pytest.raises(CabochonError, match="ArithmeticError: injected"):
        list(unlucky)


def test_a_picture_longer_than_a_step_is_refused(family: Callable[[str], LLM]) -> None:
    llm = family("31b")
    length = llm.engine.cache.plan.longest_step + 1
    picture = Picture(np.zeros((1, 768), np.float32), np.zeros((1, 2), np.int64), length)
    tokens = (2, *[llm.config.tokens.image] * length)
    with pytest.raises(RequestError, match=f"picture of {length} soft tokens"):
        llm.generate(Prompt(tokens, ((1, picture),)))
    assert idle(llm)


@pytest.mark.parametrize("ending", ["break", "raise ArithmeticError"])
def test_leaving_a_stream_open_does_not_crash_the_interpreter(ending: str) -> None:
    """A thread that computes in torch while the interpreter goes away would abort it."""
    program = f"""
from cabochon import LLM, SamplingParams
llm = LLM({str(TINY)!r})
prompt = llm.prompts.raw([2, 300])
for delta in llm.stream(prompt, SamplingParams(ignore_eos=True)):
    {ending}
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == (0 if ending == "break" else 1), run.stderr


@pytest.mark.parametrize("member", ["12b", "26b", "31b"])
@pytest.mark.parametrize("chunk", [16, 80, 150])
def test_members_together_equal_alone(
    family: Callable[[str], LLM], member: str, chunk: int
) -> None:
    """Pictures that stay whole, too few pages for all, cancelled neighbours: the same answers."""
    llm = family(member)
    many = prompts(llm, 8)
    expected = [llm.generate(prompt, GREEDY)[0] for prompt in many]
    options: dict[str, Any] = {"prefill_chunk": chunk, "kv_cache_bytes": 600_000, "max_batch": 5}
    with LLM(FIXTURES / f"{member}-bf16", dtype="float32", **options) as cramped:
        left = [cramped.stream(prompt, GREEDY) for prompt in many[:3]]
        next(left[0])
        for stream in left:
            stream.close()
        assert cramped.generate(many, GREEDY) == expected
        assert idle(cramped)


def test_closing_ends_what_runs() -> None:
    llm = LLM(TINY, dtype="float32")
    stream = llm.stream(llm.prompts.raw([2, 300]), SamplingParams(ignore_eos=True))
    next(stream)
    llm.close()
    with pytest.raises(CabochonError, match="closed"):
        list(stream)
    with pytest.raises(CabochonError, match="closed"):
        llm.generate([2, 300])
    stream.close()  # too late to matter, and no error of its own


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 2.5),
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("seed", 10**400),
        ("temperature", "1"),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("min_p", True),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop_token_ids", ("5",)),
    ],
)
def test_sampling_of_no_use_is_named(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_one_stop_string_needs_no_tuple(tiny: LLM) -> None:
    free = tiny.generate([2, 300, 301], GREEDY)[0].text
    stop = free[len(free) // 2 :][:3]
    ended = tiny.generate([2, 300, 301], replace(GREEDY, stop=stop))[0]
    assert ended.text == free[: free.index(stop)]


def test_prompts_in_all_their_forms(tiny: LLM) -> None:
    expected = tiny.generate([2, 300, 301], GREEDY)[0]
    ids = np.array([2, 300, 301])
    assert tiny.generate(ids, GREEDY) == [expected]  # type: ignore[arg-type]
    assert tiny.generate(torch.tensor([2, 300, 301]), GREEDY) == [expected]  # type: ignore[arg-type]
    assert tiny.generate([[2, 300, 301], ids], GREEDY) == [expected, expected]  # type: ignore[list-item]
    assert tiny.generate([], GREEDY) == []
    with pytest.raises(RequestError, match="row of token ids"):
        tiny.generate([2.5], GREEDY)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [("", "empty"), ([384], "0 to 383"), ([-1], "0 to 383"), ([300] * 4097, "knows 4,096")],
)
def test_logits_of_no_prompt(tiny: LLM, tokens: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tiny.logits(tokens)


def test_a_budget_too_small_says_what_it_needs(tiny: LLM) -> None:
    with pytest.raises(CabochonError, match="needs"):
        CachePlan.fit(tiny.config.text, torch.float32, 10_000, 4, 64)


@pytest.mark.parametrize(
    "options",
    [
        {"max_context": 5000},
        {"dtype": "float64"},
        {"max_batch": 0},
        {"prefill_chunk": -1},
        {"threads": 0},
    ],
)
def test_options_of_no_use_are_named(options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(CabochonError, match=rf"{name} is {value!r:.1}"):
        LLM(TINY, **options)


def test_a_machine_too_small_is_told_before_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cabochon.llm.machine_memory", lambda: 500_000)
    with pytest.raises(ResourceError, match=r"take 0\.00 GB of memory"):
        LLM(TINY)


def test_memory_that_runs_out_on_the_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are torch's own: an allocation that cannot be met."""

    def fail(*_: object, **__: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr("cabochon.assembly.execute", fail)
    with pytest.raises(ResourceError, match="memory ran out"):
        LLM(TINY)


def test_shared_layers_have_no_pages(tiny: LLM) -> None:
    own = {layer for group in cache_groups(tiny.config.text) for layer in group.layers}
    assert own == {layer.index for layer in tiny.config.text.layers if not layer.shares_kv}
