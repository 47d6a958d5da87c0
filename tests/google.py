"""Writes checkpoints in Google's own format, from its description alone, for transformers to read.

Google's converter is not public software that runs here; transformers' reader is, and is the judge.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from checkpoints import FIXTURES, Tensors, config_of, tensors_of, write
from torch import Tensor

SOURCE = FIXTURES / "e2b-bf16"

# As Google writes it for E2B, with numbers of layers cut to those of the fixture, and the embedder
# of the model without towers, for which Google has published none.
CONFIG: dict[str, Any] = {
    "quant_method": "gemma",
    "num_bits": 4,
    "quantize_embeddings": True,
    "module_quant_configs": {
        "^lm_head$": {"num_bits": 2},
        "audio_tower(?!.*lconv1d\\.linear_start)": {"num_bits": 2},
        "audio_tower\\.layers\\.\\d+\\.lconv1d\\.linear_start\\.": {"num_bits": 4},
        "language_model\\.embed_tokens$": {"num_bits": 2},
        "language_model\\.embed_tokens_per_layer$": {"num_bits": 4},
        "language_model\\.layers\\.([0-2])\\.mlp\\.": {"num_bits": 4},
        "language_model\\.layers\\.\\d+\\.mlp\\.": {"num_bits": 2},
        "language_model\\.layers\\.\\d+\\.per_layer_input_gate$": {"num_bits": 8},
        "language_model\\.layers\\.\\d+\\.per_layer_projection$": {"num_bits": 8},
        "language_model\\.layers\\.\\d+\\.self_attn\\.": {"num_bits": 4},
        "vision_tower": {"num_bits": 8},
    },
    "modules_to_not_convert": [
        "model.vision_tower.patch_embedder",
        "model.vision_embedder",
        "model.audio_tower.subsample_conv_projection",
        "model.audio_tower.output_proj",
        "relative_k_proj",
        "model.embed_audio",
        "model.embed_vision",
        "per_layer_model_projection",
    ],
}
BOUNDS = ("input_min", "input_max", "output_min", "output_max")


def kept(stored: Tensors) -> list[str]:
    """What is not converted of the modules that there are."""
    return [name for name in CONFIG["modules_to_not_convert"] if any(name in n for n in stored)]


def bits_of(module: str) -> int | None:
    """How wide a linear layer or a table is; None: it stays as it is."""
    for name in CONFIG["modules_to_not_convert"]:
        if module.endswith(name) or re.match(rf"{name}(\.|$)", module):
            return None
    found = [
        (match.start(), number, rule["num_bits"])
        for number, (pattern, rule) in enumerate(CONFIG["module_quant_configs"].items())
        if (match := re.search(pattern, module))
    ]
    return min(found)[2] if found else CONFIG["num_bits"]


def packed(numbers: Tensor, bits: int) -> Tensor:
    """Signed integers `[rows, n]` in bytes, low bits first; those of 8 bits as they are."""
    if bits == 8:
        return numbers.to(torch.int8)
    each = 8 // bits
    codes = (numbers + (1 << (bits - 1))).to(torch.uint8)
    if codes.shape[1] % each:
        codes = torch.nn.functional.pad(codes, (0, each - codes.shape[1] % each))
    codes = codes.view(len(codes), -1, each)
    return sum((codes[:, :, i] << (i * bits) for i in range(1, each)), codes[:, :, 0])


def quantized(matrix: Tensor, bits: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Packed numbers, and a scale for each of the `blocks` of each row."""
    rows = matrix.float().view(len(matrix), blocks, -1)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale = rows.abs().amax(dim=-1, keepdim=True) / -low
    numbers = (rows / scale).round().clamp(low, high).view(len(matrix), -1)
    return packed(numbers, bits), scale.flatten(1)


def checkpoint(folder: Path, *, calibrated: bool = True, dense: Path = SOURCE) -> Path:
    """`dense` in Google's format; with scales of activations, or with 0.0 in their place."""
    generator = torch.Generator().manual_seed(7)
    config, made = config_of(dense), Tensors()
    layers = len(config["text_config"]["layer_types"])
    source = tensors_of(dense)
    source["lm_head.weight"] = source["model.language_model.embed_tokens.weight"]
    for name, tensor in source.items():
        module, _, leaf = name.rpartition(".")
        bits = bits_of(module) if leaf == "weight" and tensor.ndim == 2 else None
        if "norm" in module or leaf in BOUNDS:  # the rounding stands in for clip bounds
            bits = None
        if leaf in BOUNDS:
            continue
        if bits is None:
            made[name] = tensor
        elif "embed_tokens" in module:
            blocks = layers if module.endswith("per_layer") else 1
            made[f"{module}.embedding_quantized"], made[f"{module}.embedding_scale"] = quantized(
                tensor, bits, blocks
            )
        else:
            made[name], made[f"{module}.weight_scale"] = quantized(tensor, bits, 1)
            for end in ("input", "output"):
                scale = torch.rand((), generator=generator) * 0.05 + 0.02
                if not calibrated or module == "lm_head":
                    scale = torch.zeros(())
                made[f"{module}.{end}_activation_scale"] = scale
    for layer in range(3):
        made[f"model.language_model.layers.{layer}.self_attn.k_cache_scale"] = torch.tensor(0.1)
    config["quantization_config"] = {**CONFIG, "modules_to_not_convert": kept(source)}
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    for tower in ("vision_config", "audio_config"):
        if config.get(tower) is not None:
            config[tower]["use_clipped_linears"] = False
    return write(folder, made, config)
