"""Drafters guess what transformers' own guess, beside any target, and change no answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import drafters
import numpy as np
import pytest
import torch
from checkpoints import altered
from conftest import FIXTURES, MEMBERS, noise
from ct_writer import encode
from reference import inputs, relative_error
from thin import fixture
from torch import Tensor

from cabochon import LLM, SamplingParams
from cabochon.engine.cache import CachePlan, PagedCache
from cabochon.engine.drafts import Drafts
from cabochon.engine.request import Prompt
from cabochon.engine.runner import new_sequence
from cabochon.engine.scheduler import Scheduled, TokenSequence
from cabochon.errors import LoadError
from cabochon.gemma4.drafter import Drafter
from cabochon.load.obtain import inspect_model

References = Callable[[str], Any]
COUNT = 6  # guesses


@pytest.fixture(scope="module", params=MEMBERS)
def member(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def together(member: str) -> Iterator[LLM]:
    """A tiny target and its drafter, both in float32."""
    folder = FIXTURES / f"{member}-bf16"
    with LLM(folder, drafter=drafters.drafter(member), dtype="float32") as llm:
        yield llm


def drafter_of(llm: LLM) -> tuple[Drafts, Drafter]:
    drafts = llm.engine.scheduler.guesser._drafts
    assert isinstance(drafts, Drafts)
    return drafts, drafts._drafter


def computed(llm: LLM, prompt: Prompt, drawn: int) -> tuple[TokenSequence, PagedCache]:
    """A sequence after a prompt, in a cache of its own; `drawn` is its next token."""
    length = len(prompt.tokens)
    plan = CachePlan.single(llm.config.text, length + 16, 512)
    cache = PagedCache(plan, llm.runner.kv_dtype, llm.runner.device)
    sequence = new_sequence(llm.runner.model, prompt, cache)
    while sequence.computed < length:
        chunk = sequence.chunk(24)
        assert cache.reserve(chunk)
        step = [Scheduled(sequence, chunk)]
        llm.runner.encode(step[0])
        hidden = llm.runner.run(cache, step, every=True)
    sequence.guesses.state = hidden[-1]
    sequence.tokens.append(drawn)
    return sequence, cache


class Recorded:
    """What a drafter of ours gives at each guess: states for the next one, and tokens."""

    def __init__(self, drafter: Drafter) -> None:
        self.states: list[Tensor] = []
        self._hook = drafter.post_projection.register_forward_hook(
            lambda _module, _given, made: self.states.append(made.clone())
        )

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


@torch.inference_mode()
def theirs(
    target: Any, drafter: Any, prompt: Prompt, drawn: int, count: int
) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """What transformers' drafter makes of its target's keys: tokens, states, and all logits."""
    drafters.mend()
    length, window = len(prompt.tokens), target.config.get_text_config().sliding_window
    made = target(
        **inputs(target, prompt),
        output_hidden_states=True,
        return_shared_kv_states=True,
        use_cache=False,
    )
    kept = {
        kind: tuple(x[:, :, (length - window + 1 if kind.startswith("sliding") else 0) :] for x in kv)
        for kind, kv in made.shared_kv_states.items()
    }
    state, token = made.hidden_states[-1][:, -1:], torch.tensor([[drawn]])
    tokens, states, logits = [], [], []
    for _ in range(count):
        embedded = target.get_input_embeddings()(token)
        out = drafter(
            inputs_embeds=torch.cat([embedded, state], dim=-1),
            position_ids=torch.tensor([[length]]),
            shared_kv_states=kept,
        )
        state, token = out.last_hidden_state, out.logits.argmax(dim=-1)
        tokens.append(int(token))
        states.append(state[0])
        logits.append(out.logits[0, 0])
    return tokens, states, logits


def test_guesses_are_upstreams(
    member: str, together: LLM, references: References
) -> None:
    """Each one, and the states between them; behind the window, in chunks, with a picture."""
    drafters.mend()
    target = drafters.storing(references(member))
    theirs_drafter = drafters.reference(drafters.drafter(member), member)
    rng = np.random.default_rng(3)
    words = [2, *rng.integers(280, 384, 70).tolist()]
    picture = together.prompts.raw([*words[:20], together.config.tokens.image, *words[20:40]], (noise(90, 60),))
    for prompt, drawn in ((Prompt(tuple(words)), 300), (Prompt(tuple(words[:9])), 290), (picture, 310)):
        drafts, drafter = drafter_of(together)
        sequence, cache = computed(together, prompt, drawn)
        with Recorded(drafter) as recorded:
            ours = Drafts(drafter, together.runner, cache)([sequence], COUNT)[0]
        tokens, states, _ = theirs(target, theirs_drafter, prompt, drawn, COUNT)
        assert ours == tokens
        for mine, its in zip(recorded.states, states, strict=True):
            assert relative_error(mine, its) < 1e-5
