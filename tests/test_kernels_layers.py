"""Decoder layers in one call against the modules that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from thin import fixture
from torch import Tensor

from cabochon import LLM, SamplingParams
from cabochon.engine.cache import CachePlan, PagedCache
from cabochon.engine.request import Prompt
from cabochon.engine.runner import new_sequence
from cabochon.engine.scheduler import Scheduled
from cabochon.gemma4.text import LayerCall
from cabochon.kernels.library import library
from cabochon.nn.attention import KeyValues
from cabochon.nn.rotary import Rotation

FIXTURES = Path(__file__).parent / "fixtures"
TOKENS = [2, *(60 + i * 7 % 90 for i in range(70))]

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler where it was installed")


def logits(llm: LLM, fused: bool) -> Tensor:
    """Of the prompt, in chunks, and of each token after it when it comes alone."""
    text = llm.runner.model.model.language_model
    fast = dict(text.fused), text.together
    if not fused:
        text.fused, text.together = {}, None
    try:
        llm.prefill_chunk = 16
        chunks = llm.logits(TOKENS)
        llm.prefill_chunk = 1
        return torch.cat((chunks, llm.logits(TOKENS)))
    finally:
        text.fused, text.together = fast


@pytest.mark.parametrize("isa", ["avx512vnni", "avxvnni", "avx2", "neon", "scalar"])
@pytest.mark.parametrize("name", ["e2b-w4a16", "12b-w4a16", "31b-w4a16"])
def test_a_layer_in_one_call_computes_what_its_modules_do(name: str, isa: str) -> None:
    kernels = library()
    assert kernels is not None
    if isa not in kernels.available():
        pytest.skip(f"this processor has no {isa}")
    before = kernels.isa
    kernels.choose(isa)
    try:
        with LLM(fixture(name), activations="int16", kv_dtype="float32") as llm:
            text = llm.runner.model.model.language_model
            assert len(text.fused) == len(text.layers)
            one, other = logits(llm, fused=True), logits(llm, fused=False)
    finally:
        kernels.choose(before)
    assert (one - other).abs().max() < 2e-3 * other.abs().max()


def drawn_from(llm: LLM, lengths: Sequence[int]) -> Tensor:
    """What the last token of prompts of such lengths is followed by, all in two steps of chunks."""
    plan = CachePlan.fit(llm.config.text, torch.float32, 1 << 24, len(lengths), 64)
    cache = PagedCache(plan, torch.float32, torch.device("cpu"))
    prompts = [Prompt(tuple(TOKENS[:length])) for length in lengths]
    sequences = [new_sequence(llm.runner.model, prompt, cache) for prompt in prompts]
    made = []
    for _ in range(2):
        step = [Scheduled(s, s.chunk(32)) for s in sequences if s.computed < len(s.tokens)]
        assert all(cache.reserve(scheduled.chunk) for scheduled in step)
        made.append(llm.runner.run(cache, step))
    return torch.cat(made)


@pytest.mark.parametrize("name", ["e2b-w4a16", "12b-w4a16"])
def test_steps_of_which_few_rows_are_wanted_are_the_same_in_one_call(name: str) -> None:
    """Where layers share keys and values, only those rows go on: none, one or all of a chunk."""
    with LLM(fixture(name), activations="int16", kv_dtype="float32") as llm:
        text = llm.runner.model.model.language_model
        one = drawn_from(llm, (40, 7, 1, 33))
        text.fused, text.together = {}, None
        other = drawn_from(llm, (40, 7, 1, 33))
    assert len(one) == 4
    assert (one - other).norm(dim=1).max() < 2e-3 * other.norm(dim=1).max()


def test_two_who_compute_at_once_have_their_own_caches() -> None:
    """One begins when the other, in another thread, has said where its cache lies."""
    with LLM(fixture("e2b-w4a16"), activations="int16") as llm:
        llm.prefill_chunk = 16
        text = llm.runner.model.model.language_model
        expected, compute = llm.logits(TOKENS), text.together._library.text
        others: list[Tensor] = []

        def interrupted(*arguments: object) -> None:
            text.together._library.text = compute
            others.append(llm.logits(TOKENS[::-1]))
            compute(*arguments)

        text.together._library.text = interrupted
        try:
            assert torch.equal(llm.logits(TOKENS), expected)
        finally:
            text.together._library.text = compute
        assert torch.equal(others[0], llm.logits(TOKENS[::-1]))


MIXTURES = [
    "26b-w4a16",
    "26b-nvfp4a16",
    "gguf/26b/26b-q4_0.gguf",
    "gguf/26b/26b-mxfp4.gguf",
    "gguf/26b-wide/26b-q4_k_m.gguf",
]


@pytest.mark.parametrize("name", MIXTURES)
def test_layers_with_experts_do_so_one_by_one(name: str) -> None:
    """Given the same rows: where two experts are as good, a hair decides, and later layers differ.

    Of 1,000 choices that are made here, a few may be so.
    """
    off: list[Tensor] = []

    def watched(fused: LayerCall, module: LayerCall) -> LayerCall:
        def call(x: Tensor, own: Tensor | None, rotation: Rotation, kv: KeyValues) -> Tensor:
            expected, made = module(x, own, rotation, kv), fused(x, own, rotation, kv)
            off.append((made - expected).norm(dim=1) / expected.norm(dim=1))
            return expected

        return call

    with LLM(fixture(name), activations="int16", kv_dtype="float32") as llm:
        text = llm.runner.model.model.language_model
        assert len(text.fused) == len(text.layers)
        text.together = None
        for index, layer in enumerate(text.layers):
            text.fused[index] = watched(text.fused[index], layer)
        llm.prefill_chunk = 16
        llm.logits(TOKENS)
        llm.prefill_chunk = 1
        llm.logits(TOKENS[:20])
    errors = torch.cat(off)
    assert (errors > 5e-3).float().mean() < 0.01
    assert errors.median() < 1e-3


@pytest.mark.parametrize("name", ["e2b-w4a16-asym", "e2b-nvfp4a16"])
def test_rounded_activations_stay_close_to_float32(name: str) -> None:
    """These models are random, and react to rounding more than trained ones do."""
    with LLM(fixture(name), dtype="float32") as llm:
        exact = llm.logits(TOKENS)
    for activations, limit in (("int8", 0.1), ("int16", 0.02)):
        with LLM(fixture(name), activations=activations) as llm:
            assert (llm.logits(TOKENS) - exact).norm() < limit * exact.norm()


def test_the_demo_answers_the_same_in_every_mode() -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30)
    questions = [[{"role": "user", "content": f"What is {a} plus {9 - a}?"}] for a in range(6)]
    answers = []
    for activations in ("float32", "int16", "int8"):
        with LLM(activations=activations) as llm:
            answers.append([llm.chat(question, params).text for question in questions])
    assert answers[0] == answers[1] == answers[2]
