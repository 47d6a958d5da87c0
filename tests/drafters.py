"""Drafters of the tiny models, made and saved by transformers' own classes while the tests run."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import FIXTURES

HIDDEN = 32
CLUSTERED = ("e2b",)  # as the drafters of the two smallest models are
CLUSTERS = {"num_centroids": 16, "centroid_intermediate_top_k": 3}


@cache
def _room() -> Path:
    room = Path(tempfile.mkdtemp(prefix="cabochon-drafters-"))
    atexit.register(shutil.rmtree, room, ignore_errors=True)
    return room


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


@cache
def drafter(member: str) -> Path:
    """The folder of a drafter for the tiny model of `member`, of random weights."""
    from transformers import AutoTokenizer

    mend()
    folder = _room() / member
    torch.manual_seed(20)
    model = _class(member)(_config(member))
    _spread(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(FIXTURES / f"{member}-bf16").save_pretrained(folder)
    return folder


def reference(folder: Path, member: str) -> Any:
    """transformers' own model of a drafter, in float32."""
    mend()
    model = _class(member).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def _class(member: str) -> Any:
    from transformers import Gemma4AssistantForCausalLM, Gemma4UnifiedAssistantForCausalLM

    return Gemma4UnifiedAssistantForCausalLM if member == "12b" else Gemma4AssistantForCausalLM


def _config(member: str) -> Any:
    from transformers import Gemma4AssistantConfig, Gemma4UnifiedAssistantConfig

    kinds = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
    told = json.loads((FIXTURES / f"{member}-bf16" / "config.json").read_text())["text_config"]
    text = {key: told[key] for key in _LIKE_THE_TARGET if key in told} | {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": len(kinds),
        "num_kv_shared_layers": len(kinds),
        "layer_types": kinds,
        "global_head_dim": 32,
        "attention_k_eq_v": member != "e2b",
    }
    if member != "e2b":
        text["num_global_key_value_heads"] = 1
    cls = Gemma4UnifiedAssistantConfig if member == "12b" else Gemma4AssistantConfig
    if member != "12b":
        text |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    text["model_type"] = "gemma4_unified_text" if member == "12b" else "gemma4_text"
    clusters = {"use_ordered_embeddings": True, **CLUSTERS} if member in CLUSTERED else {}
    return cls(text_config=text, backbone_hidden_size=told["hidden_size"], **clusters)


_LIKE_THE_TARGET = (
    "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
    "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters",
)  # fmt: skip


@torch.no_grad()
def _spread(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("q_norm.weight"):
            parameter.uniform_(0.3, 0.5)
        elif parameter.ndim == 1:
            parameter.uniform_(0.5, 1.0)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.6, 0.9)
        elif name.endswith("token_ordering"):
            buffer.copy_(torch.randperm(len(buffer)))


def storing(target: Any) -> Any:
    """A target of transformers that hands out what its drafters read."""
    text = target.model.language_model
    for layer, mode in zip(text.layers, _sharing(text.config), strict=True):
        layer.self_attn.store_full_length_kv = mode == "store"
    return target
