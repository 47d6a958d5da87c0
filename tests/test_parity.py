"""Our models compute what transformers computes, submodule by submodule and token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import FIXTURES, MEMBERS, hiss, noise
from PIL import Image
from reference import greedy, inputs, logits, relative_error
from torch import Tensor

from cabochon import LLM, SamplingParams
from cabochon.engine.request import Prompt
from cabochon.gemma4.model import Gemma4
from cabochon.gemma4.sounds import Wave
from cabochon.verify.reference import Departure, departures
from cabochon.verify.verification import Subject

TOLERANCE = 1e-4
CLOSE = 2e-6  # of one module on the same inputs
TEXT = [2, 4, *(280 + 37 * i % 100 for i in range(120)), 5]
HEARING = ("e2b", "12b")

Family = Callable[[str], LLM]
References = Callable[[str], Any]


class Media(NamedTuple):
    images: tuple[Image.Image, ...] = ()
    sounds: tuple[Wave, ...] = ()


CASES = {
    "text": Media(),
    "picture": Media((noise(100, 60),)),
    "two pictures": Media((noise(100, 60), noise(40, 200, seed=1))),
    "sound": Media((), (hiss(9_000),)),
    "mixed": Media((noise(60, 60), noise(50, 90)), (hiss(5_000), hiss(12_345, seed=1))),
}
RUNS = [
    pytest.param(member, media, id=f"{member}-{name}")
    for member in MEMBERS
    for name, media in CASES.items()
    if member in HEARING or not media.sounds
]


def prompt_of(llm: LLM, media: Media) -> Prompt:
    """Text with the media spread over its middle."""
    ids = llm.config.tokens
    places = [ids.image] * len(media.images) + [ids.audio] * len(media.sounds)
    tokens = TEXT[:40] + [t for place in places for t in (place, 310)] + TEXT[40:]
    return llm.prompts.raw(tokens, media.images, media.sounds)


def our_logits(llm: LLM, media: Media) -> Tensor:
    return llm.logits(list(prompt_of(llm, media).tokens), media.images, media.sounds)


def found(model: Any, ours: Gemma4, prompt: Prompt) -> list[Departure]:
    """Every module of ours beside upstream's, each given what upstream's modules made."""
    return [one for one in departures(model, ours, prompt) if isinstance(one, Departure)]


@pytest.mark.parametrize(
    ("member", "media"),
    [
        pytest.param(member, media, id=f"{member}-{name}")
        for member in MEMBERS
        for name, media in (("text", Media()), ("media", CASES["picture"]))
    ]
    + [pytest.param(member, CASES["sound"], id=f"{member}-sound") for member in HEARING],
)
def test_every_submodule(family: Family, references: References, member: str, media: Media) -> None:
    ours = Subject(FIXTURES / f"{member}-bf16").model
    modules = found(references(member), ours, prompt_of(family(member), media))
    assert len({module.name for module in modules}) > (90 if member == "e2b" else 70)
    assert [module for module in modules if not module.error < CLOSE] == []


@pytest.mark.parametrize(("member", "media"), RUNS)
def test_logits(family: Family, references: References, member: str, media: Media) -> None:
    llm = family(member)
    expected = logits(references(member), prompt_of(llm, media))
    assert relative_error(our_logits(llm, media), expected) < TOLERANCE


@pytest.mark.parametrize("chunk", [7, 16, 100])
@pytest.mark.parametrize("member", MEMBERS)
def test_logits_in_chunks(references: References, member: str, chunk: int) -> None:
    """The prompt exceeds the sliding window, and pictures lie across the edges of chunks."""
    media = CASES["mixed" if member in HEARING else "two pictures"]
    with LLM(FIXTURES / f"{member}-bf16", dtype="float32", prefill_chunk=chunk) as llm:
        prompt = prompt_of(llm, media)
        assert len(prompt.tokens) > 3 * max(layer.window or 0 for layer in llm.config.text.layers)
        ours = our_logits(llm, media)
    assert relative_error(ours, logits(references(member), prompt)) < TOLERANCE


@pytest.mark.parametrize(("member", "media"), RUNS)
def test_greedy_tokens(family: Family, references: References, member: str, media: Media) -> None:
    llm = family(member)
    prompt = prompt_of(llm, media)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    expected = greedy(references(member), prompt, 64)
    assert list(llm.generate(prompt, params)[0].tokens) == expected


@pytest.mark.parametrize("member", ["e2b", "12b", "31b"])
def test_bfloat16_is_upstreams_bfloat16(member: str) -> None:
    """The same roundings in the same places, up to the order of sums.

    Not the mixture of experts: rounding there changes which experts are chosen, upstream as here.
    """
    from transformers import AutoModelForImageTextToText

    folder = FIXTURES / f"{member}-bf16"
    reference = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    with LLM(folder, dtype="bfloat16") as llm:
        prompt = prompt_of(llm, CASES["picture"])
        ours = our_logits(llm, CASES["picture"])
        made = inputs(reference, prompt)
        made["pixel_values"] = made["pixel_values"].bfloat16()
        with torch.inference_mode():
            theirs = reference(**made).logits[0].float()
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean() > 0.998
