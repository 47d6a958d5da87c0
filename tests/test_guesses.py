"""Guesses change no answer: what is drawn with them is what is drawn without, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from thin import fixture

from cabochon import LLM, SamplingParams
from cabochon.assembly import DRAFT_TOKENS
from cabochon.engine.cache import PAGE, CachePlan, Chunk, PagedCache
from cabochon.engine.guesses import Guesser, Reach
from cabochon.engine.guide import Guide, TurnRules
from cabochon.engine.lookup import LEAST_ALIKE, MOST_ALIKE, Lookup
from cabochon.engine.request import Completion, Prompt
from cabochon.engine.scheduler import Scheduler, TokenSequence
from cabochon.text.parser import Structure

MODELS = ("e2b-w4a16", "12b-w4a16", "26b-w4a16", "31b-w4a16", "e2b-bf16", "26b-bf16")
CIRCLE = [2, *(300 + i % 5 for i in range(40))]


def loaded(name: str, draft_tokens: int | None, **options: int) -> LLM:
    return LLM(fixture(name), draft_tokens=draft_tokens, **options)  # type: ignore[arg-type]


def written(llm: LLM, prompt: list[int], **params: object) -> Completion:
    asked = SamplingParams(max_tokens=100, ignore_eos=True, **params)  # type: ignore[arg-type]
    return llm.generate(Prompt(tuple(prompt)), asked)[0]


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_beside_guesses_are_those_alone_to_the_bit(name: str, activations: str) -> None:
    with LLM(fixture(name), activations=activations) as llm:  # type: ignore[arg-type]
        assert llm.engine.scheduler.guesser.most == DRAFT_TOKENS
        prompt = [2, *np.random.default_rng(1).integers(280, 380, 60).tolist()]
        found = []
        for llm.prefill_chunk in range(1, DRAFT_TOKENS + 2):
            found.append(llm.logits(prompt))
        assert all(torch.equal(found[0], other) for other in found)


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, LLM]]:
    """The same model with guesses and without."""
    with loaded(request.param, None) as guessing, loaded(request.param, 0) as plain:
        yield guessing, plain


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 3, "top_k": 8},
        {"temperature": 0.5, "seed": 4, "top_p": 0.9, "frequency_penalty": 0.2},
        {"temperature": 0.0, "repetition_penalty": 1.1, "logprobs": 3},
    ],
    ids=["greedy", "sampled", "penalties", "repetition"],
)
def test_answers_are_the_same(pair: tuple[LLM, LLM], params: dict[str, object]) -> None:
    guessing, plain = pair
    assert written(guessing, CIRCLE, **params) == written(plain, CIRCLE, **params)


def test_guesses_are_tried_and_save_steps(pair: tuple[LLM, LLM]) -> None:
    guessing, plain = pair
    before = guessing.engine.stats.steps, plain.engine.stats.steps
    for seed in range(3):
        params = {"temperature": 0.3, "seed": seed, "top_k": 4}
        assert written(guessing, CIRCLE, **params) == written(plain, CIRCLE, **params)
    stats = guessing.engine.stats
    assert 0 < stats.guessed_right < stats.guessed, "some right and some wrong"
    assert stats.steps - before[0] < plain.engine.stats.steps - before[1]
    assert plain.engine.stats.guessed == 0


def test_requests_together_are_the_same(pair: tuple[LLM, LLM]) -> None:
    guessing, plain = pair
    prompts = [[2, *(290 + seed + i % (3 + seed) for i in range(30))] for seed in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)
    assert guessing.generate(prompts, params) == plain.generate(prompts, params)


def test_an_answer_ends_where_it_should(pair: tuple[LLM, LLM]) -> None:
    """At its last token and at a token that stops it, though more was guessed."""
    guessing, plain = pair
    for most in range(1, 12):
        params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
        found = guessing.generate(CIRCLE, params)[0]
        assert found == plain.generate(CIRCLE, params)[0]
        assert len(found.tokens) == most
    stop = plain.generate(CIRCLE, params)[0].tokens[7]
    params = SamplingParams(temperature=0.0, stop_token_ids=(stop,), max_tokens=50)
    assert guessing.generate(CIRCLE, params) == plain.generate(CIRCLE, params)


def test_the_next_turn_finds_the_pages(pair: tuple[LLM, LLM]) -> None:
    """Pages that guesses filled bear the names of what was really drawn, and hold it."""
    guessing, plain = pair
    first = written(guessing, CIRCLE, temperature=0.0)
    assert written(plain, CIRCLE, temperature=0.0) == first  # both have seen the same
    again = [*CIRCLE, *first.tokens, 300, 301]
    hits = guessing.engine.scheduler.prefix_hits
    assert written(guessing, again, temperature=0.0) == written(plain, again, temperature=0.0)
    found = guessing.engine.scheduler.prefix_hits - hits
    assert found >= len(CIRCLE) + len(first.tokens) - 3 * PAGE
    cache = guessing.engine.cache
    assert cache.free_pages() == cache.plan.pages


def test_guesses_take_no_page_from_anybody() -> None:
    """With room for little more than a sequence, nobody is put off for a guess."""
    small = {"kv_cache_bytes": 70_000, "prefill_chunk": 16, "max_batch": 8}
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    prompts = [[2, *(290 + seed + i % 4 for i in range(90))] for seed in range(8)]
    with loaded("e2b-w4a16", 12, **small) as guessing, loaded("e2b-w4a16", 0, **small) as plain:
        assert guessing.generate(prompts, params) == plain.generate(prompts, params)
        assert guessing.engine.stats.guessed_right
        put_off = guessing.engine.scheduler.preemptions, plain.engine.scheduler.preemptions
        assert put_off[1] > 0
        assert put_off[0] <= put_off[1]


def test_a_guess_takes_no_page_that_another_needs_in_the_same_step(tiny: LLM) -> None:
    """Of three pages two sequences hold one each, and the second is about to begin the third."""
    plan = CachePlan.single(tiny.config.text, 3 * PAGE, PAGE)
    plan = replace(plan, pages=tuple(3 for _ in plan.groups), max_batch=2)
    cache = PagedCache(plan, torch.float32, torch.device("cpu"))

    class Far(Guesser):
        def __call__(self, sequences: Sequence[TokenSequence]) -> None:
            sequences[0].guesses.tokens = [7] * PAGE

    scheduler = Scheduler(cache, PAGE, Far(PAGE))
    for length in (PAGE // 2, PAGE + 1):
        sequence = TokenSequence(cache.new_table(), [2] * length, {}, computed=length - 1)
        assert cache.reserve(Chunk(sequence.table, 0, length - 1))
        scheduler.running.append(sequence)
    step = scheduler.schedule()
    assert [s.sequence for s in step] == scheduler.running
    assert [s.chunk.stop - s.chunk.start for s in step] == [1, 1]
    assert (len(step), scheduler.preemptions) == (2, 0)


def test_exact_modes_guess_nothing(tiny: LLM) -> None:
    assert tiny.engine.scheduler.guesser.most == 0


def test_a_prompt_whose_tokens_are_scored(pair: tuple[LLM, LLM]) -> None:
    guessing, plain = pair

    def told(llm: LLM) -> list[object]:
        params = SamplingParams(temperature=0.0, prompt_logprobs=2, max_tokens=30, ignore_eos=True)
        return [(d.tokens, d.prompt_logprobs) for d in llm.stream(Prompt(tuple(CIRCLE)), params)]

    assert told(guessing) == told(plain)


def test_what_a_grammar_forces_is_guessed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Names of a schema cost no step of their own; the answer is what it is without guesses.

    Nor does it change where that cannot be found out.
    """

    def fail(*_: object) -> list[int]:
        raise RuntimeError("lost")

    names = {name: {"type": "boolean"} for name in ("colour_of_the_shape", "number_of_corners")}
    schema = {"type": "object", "properties": names, "required": list(names)}
    schema["additionalProperties"] = False
    told = []
    for draft_tokens, failing in ((0, False), (15, False), (15, True)):
        if failing:
            monkeypatch.setattr(Guide, "forced", fail)
        with LLM(draft_tokens=draft_tokens) as llm:
            rules = TurnRules(
                structure=Structure.of(llm.prompts.tokenizer),
                text=llm.grammars.json_schema(schema),
            )
            params = SamplingParams(temperature=0.7, seed=2, max_tokens=80, rules=rules)
            told.append((llm.generate(CIRCLE, params), llm.engine.stats))
    (plain, without), (guessed, stats), (unforced, _) = told
    assert guessed == plain == unforced
    assert [record.message for record in caplog.records] == [
        "what a request says next cannot be guessed: it goes on without"
    ]
    assert json.loads(guessed[0].text).keys() == names.keys()
    assert stats.guessed_right > 0.8 * stats.guessed > 0
    assert stats.steps < without.steps / 2


def spelled_out(tokens: list[int], most: int) -> list[int]:
    """What should be guessed, looked for place by place."""
    best, place = 0, None
    for end in range(len(tokens) - 1):
        alike = 0
        while alike < min(MOST_ALIKE, end + 1) and tokens[end - alike] == tokens[-1 - alike]:
            alike += 1
        if alike >= max(best, LEAST_ALIKE):
            best, place = alike, end
    if place is None:
        return []
    known = list(tokens)
    for i in range(most):
        known.append(known[place + 1 + i])
    return known[len(tokens) :]


def test_guesses_follow_the_latest_place_that_is_most_alike() -> None:
    rng = np.random.default_rng(5)
    guessed = 0
    for _ in range(300):
        tokens = rng.integers(0, rng.integers(2, 9), rng.integers(1, 60)).tolist()
        found = Lookup().guess(tokens, 3)
        assert found == spelled_out(tokens, 3)
        guessed += bool(found)
    assert guessed > 100


def test_reach_learns() -> None:
    """It goes further while guesses are right, and pauses longer and longer while they are not."""
    reach, lengths = Reach(), []
    for _ in range(3):
        lengths.append(reach.now())
        reach.judge(lengths[-1], lengths[-1])
    reach.judge(12, 5)
    assert [*lengths, reach.now()] == [3, 6, 12, 6]
    pauses = []
    for _ in range(6):
        reach.judge(3, 0)
        pause = 0
        while not reach.now():
            pause += 1
        pauses.append(pause)
    assert pauses == [1, 3, 7, 15, 16, 16]
