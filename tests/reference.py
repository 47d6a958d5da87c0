"""Runs a prompt through transformers the way upstream's processor would feed it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cabochon.engine.request import Prompt
from cabochon.gemma4.pictures import Picture
from cabochon.gemma4.sounds import Sound


def inputs(model: Any, prompt: Prompt) -> dict[str, Any]:
    """What `model` takes for `prompt`: media padded to a common size, with masks, as upstream does.

    That the media themselves are preprocessed as upstream does it is tested elsewhere.
    """
    ids = torch.tensor([prompt.tokens])
    config = model.config
    kinds = (ids == config.image_token_id).long() + 3 * (ids == config.audio_token_id).long()
    made: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
    }
    pictures = [item for _, item in prompt.media if isinstance(item, Picture)]
    if pictures:
        budget = 70 if "unified" in config.model_type else 630
        made["pixel_values"] = torch.stack([_padded(p.patches, budget, 0.0) for p in pictures])
        places = [_padded(p.positions, budget, -1) for p in pictures]
        made["image_position_ids"] = torch.stack(places)
    sounds = [item.features for _, item in prompt.media if isinstance(item, Sound)]
    if sounds:
        longest = max(len(frames) for frames in sounds) + 3
        made["input_features"] = torch.stack([_padded(frames, longest, 0.0) for frames in sounds])
        lengths = torch.tensor([[len(frames)] for frames in sounds])
        made["input_features_mask"] = torch.arange(longest) < lengths
    return made


def _padded(rows: np.ndarray[Any, Any], length: int, value: float) -> Tensor:
    padding = [(0, length - len(rows)), (0, 0)]
    return torch.from_numpy(np.pad(rows, padding, constant_values=value))


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
