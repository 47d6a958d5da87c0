"""Drafters of the tiny models, and transformers' own of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stored import FIXTURES


def drafter(member: str) -> Path:
    """The folder of a drafter for the tiny model of `member`; its weights are random."""
    return FIXTURES / f"{member}-assistant"


def reference(folder: Path, member: str) -> Any:
    """transformers' own model of a drafter, in float32."""
    mend()
    model = class_of(member).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def class_of(member: str) -> Any:
    from transformers import Gemma4AssistantForCausalLM, Gemma4UnifiedAssistantForCausalLM

    return Gemma4UnifiedAssistantForCausalLM if member == "12b" else Gemma4AssistantForCausalLM


def mend() -> None:
    """Let transformers make drafters: 5.23 refuses all models whose layers share all they read.

    Its check wants a layer that makes keys and values in the model itself, which a drafter has not
    (`kv_sharing_modes`); targets that share nothing then keep nothing for drafters either.
    """
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    from transformers.models.gemma4_unified.configuration_gemma4_unified import (
        Gemma4UnifiedTextConfig,
    )

    for cls in (Gemma4TextConfig, Gemma4UnifiedTextConfig):
        cls.kv_sharing_modes = property(_sharing)


def _sharing(config: Any) -> list[str | None]:
    count, shared = config.num_hidden_layers, config.num_kv_shared_layers
    makers = config.layer_types[: count - shared]
    last = {kind: index for index, kind in enumerate(makers)}
    modes: list[str | None] = [None] * len(makers)
    for index in last.values():
        modes[index] = "store"
    return [*modes, *["reuse"] * shared]


def storing(target: Any) -> Any:
    """A target of transformers that hands out what its drafters read."""
    text = target.model.language_model
    for layer, mode in zip(text.layers, _sharing(text.config), strict=True):
        layer.self_attn.store_full_length_kv = mode == "store"
    return target
