"""Runs a prompt through transformers the way upstream's processor would feed it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cabochon.engine.request import Prompt
from cabochon.verify.upstream import inputs_of

PADDING = 18  # rows; of patches, that pooling takes together, a whole number of squares


def inputs(model: Any, prompt: Prompt) -> dict[str, Any]:
    """What `model` takes for `prompt`: media padded, with masks, as upstream does it.

    That the media themselves are preprocessed as upstream does it is tested elsewhere.
    """
    return inputs_of(model, prompt, padding=PADDING)


@torch.inference_mode()
def logits(model: Any, prompt: Prompt) -> Tensor:
    out: Tensor = model(**inputs(model, prompt)).logits[0]
    return out


@torch.inference_mode()
def greedy(model: Any, prompt: Prompt, count: int) -> list[int]:
    """The `count` likeliest tokens after `prompt`, whatever they are."""
    out = model.generate(
        **inputs(model, prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
    )
    return [int(token) for token in out[0, len(prompt.tokens) :]]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
