"""Runs a prompt through transformers the way upstream's processor would feed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def inputs(model: Any, tokens: Sequence[int], images: Sequence[Image.Image] = ()) -> dict[str, Any]:
    """What `model` takes for `tokens`, in which the pictures are expanded already."""
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

    ids = torch.tensor([list(tokens)])
    made: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
    }
    if images:
        processor = Gemma4ImageProcessorPil(max_soft_tokens=70)
        pixels = processor(images=list(images), return_tensors="pt")
        made["pixel_values"] = pixels["pixel_values"]
        made["image_position_ids"] = pixels["image_position_ids"]
    return made


@torch.inference_mode()
def logits(model: Any, tokens: Sequence[int], images: Sequence[Image.Image] = ()) -> Tensor:
    out: Tensor = model(**inputs(model, tokens, images)).logits[0]
    return out


@torch.inference_mode()
def greedy(
    model: Any, tokens: Sequence[int], images: Sequence[Image.Image], count: int
) -> list[int]:
    """The `count` likeliest tokens after `tokens`, whatever they are."""
    out = model.generate(
        **inputs(model, tokens, images),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
    )
    return [int(token) for token in out[0, len(tokens) :]]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
