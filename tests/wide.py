"""Models whose rows k-quants can hold: small configurations, and weights made from their names."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path

import torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "q4_k"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
COMPANIONS += ("processor_config.json", "generation_config.json")


def original(member: str, folder: Path) -> Path:
    """The bfloat16 checkpoint of `member`, saved by transformers."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(FOLDER / member)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.startswith("lm_head."):  # it is the table
                tensor.copy_(values(name, tensor.shape))
    model.save_pretrained(folder)
    for companion in COMPANIONS:
        shutil.copy(FIXTURES / f"{member}-bf16" / companion, folder)
    return folder


def values(name: str, shape: torch.Size) -> Tensor:
    """Random ones of the sizes that a trained model has; the same for the same name."""
    chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    unit = torch.rand(shape, generator=chance) * 2 - 1
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.4 + 0.1 * unit  # attention is not scaled
    if name.endswith("_max"):
        return 2 + 0.5 * unit
    if name.endswith("_min"):
        return -2 + 0.5 * unit
    if name.endswith("std_scale"):
        return 0.03 + 0.02 * unit
    if name.endswith((".bias", "per_dim_scale", "std_bias")):
        return 0.1 * unit
    if len(shape) < 2:
        return 0.75 + 0.25 * unit
    return unit * (0.1 if "embed" in name else (3 / shape[-1]) ** 0.5)
