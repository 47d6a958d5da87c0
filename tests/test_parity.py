"""Our model computes what transformers computes, submodule by submodule and token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import TINY, noise
from PIL import Image
from reference import greedy, inputs, logits, relative_error
from torch import Tensor, nn

from cabochon import LLM, SamplingParams
from cabochon.gemma4.text import TextModel

TOLERANCE = 1e-4
TEXT = [2, 4, *(280 + 37 * i % 100 for i in range(120)), 5]


@contextmanager
def traced(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The output of every module that is called inside, by name, in execution order."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            while not isinstance(output, Tensor):  # upstream returns tuples and output classes
                output = output[0]
            outputs[name] = output.detach().float()

        return hook

    hooks = [m.register_forward_hook(record(n)) for n, m in model.named_modules() if n]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of modules that both ran, in the reference's order, whose outputs differ."""
    common = [name for name in theirs if name in ours]
    differing = []
    for name in common:
        mine = ours[name]
        other = theirs[name].reshape(-1, *theirs[name].shape[-(mine.ndim - 1) :])
        # Upstream pads pictures to the patch budget and masks the padding; we have none.
        error = relative_error(mine, other[: len(mine)])
        if not error < TOLERANCE:
            differing.append(f"{name}: {error:.1e}")
    return differing


def ours_by_name(llm: LLM, tokens: list[int], images: list[Image.Image]) -> dict[str, Tensor]:
    with traced(llm.runner.model) as outputs:
        llm.logits(tokens, images)
    return outputs


def theirs_by_name(
    model: Any, tokens: tuple[int, ...], images: list[Image.Image]
) -> dict[str, Tensor]:
    with traced(model) as outputs, torch.inference_mode():
        model(**inputs(model, tokens, images))
    return outputs


@pytest.mark.parametrize("images", [[], [noise(100, 60)]], ids=["text", "picture"])
def test_every_submodule(tiny: LLM, reference: Any, images: list[Image.Image]) -> None:
    tokens = TEXT[:60] + [tiny.config.image_token_id] * len(images) + TEXT[60:]
    ours = ours_by_name(tiny, tokens, images)
    theirs = theirs_by_name(reference, tiny.prompt(tokens, images).tokens, images)
    unmatched = [name for name in ours if name not in theirs and not name.endswith(".weight")]
    assert unmatched == []
    assert len(set(ours) & set(theirs)) > (150 if images else 90)
    assert compare(ours, theirs) == []


PICTURES = {
    "text": [],
    "one picture": [noise(100, 60)],
    "two pictures": [noise(100, 60), noise(40, 200, seed=1)],
}


def with_pictures(llm: LLM, images: list[Image.Image]) -> list[int]:
    image = llm.config.image_token_id
    return TEXT[:40] + [token for _ in images for token in (image, 310)] + TEXT[40:]


@pytest.mark.parametrize("images", PICTURES.values(), ids=PICTURES)
def test_logits(tiny: LLM, reference: Any, images: list[Image.Image]) -> None:
    prompt = tiny.prompt(with_pictures(tiny, images), images)
    expected = logits(reference, prompt.tokens, images)
    assert relative_error(tiny.logits(list(prompt.tokens), images), expected) < TOLERANCE


@pytest.mark.parametrize("chunk", [7, 16, 100])
def test_logits_in_chunks(reference: Any, chunk: int) -> None:
    """The prompt exceeds the sliding window, and pictures lie across the edges of chunks."""
    images = PICTURES["two pictures"]
    with LLM(TINY, dtype="float32", prefill_chunk=chunk) as llm:
        prompt = llm.prompt(with_pictures(llm, images), images)
        assert len(prompt.tokens) > 3 * max(layer.window or 0 for layer in llm.config.text.layers)
        ours = llm.logits(list(prompt.tokens), images)
    assert relative_error(ours, logits(reference, prompt.tokens, images)) < TOLERANCE


@pytest.mark.parametrize("images", PICTURES.values(), ids=PICTURES)
def test_greedy_tokens(tiny: LLM, reference: Any, images: list[Image.Image]) -> None:
    prompt = tiny.prompt(with_pictures(tiny, images), images)
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    expected = greedy(reference, prompt.tokens, images, 64)
    assert list(tiny.generate(prompt, params)[0].tokens) == expected


FAULTS: dict[str, tuple[Callable[[TextModel], None], str]] = {}


def fault(first_divergence: str) -> Callable[[Callable[[TextModel], None]], None]:
    def register(inject: Callable[[TextModel], None]) -> None:
        FAULTS[inject.__name__] = (inject, first_divergence)

    return register


@fault("model.language_model.layers.0")
def layer_scalar_dropped(text: TextModel) -> None:
    text.layers[0].layer_scalar = torch.ones(1)


@fault("model.language_model.layers.0.mlp.gate_proj")
def gate_and_up_swapped(text: TextModel) -> None:
    mlp = text.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


@fault("model.language_model.layers.0.self_attn.v_norm")
def values_not_normed(text: TextModel) -> None:
    text.layers[0].self_attn.v_norm = nn.Identity()


@fault("model.language_model.embed_tokens")
def embedding_not_scaled(text: TextModel) -> None:
    text.embed_tokens.scale = 1.0


@pytest.mark.parametrize(("inject", "first"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found_where_it_is(
    reference: Any, inject: Callable[[TextModel], None], first: str
) -> None:
    with LLM(TINY, dtype="float32") as llm:
        inject(llm.runner.model.model.language_model)
        differing = compare(ours_by_name(llm, TEXT, []), theirs_by_name(reference, tuple(TEXT), []))
    assert differing[0].startswith(first + ":")
