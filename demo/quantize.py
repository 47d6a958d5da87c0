"""Quantize DIR/bf16 to W4A16 with llm-compressor: `python demo/quantize.py DIR/bf16 OUT`.

Needs an environment with llmcompressor. Data-free: the training has already rounded the weights.
"""

import argparse
import shutil
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForImageTextToText

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "generation_config.json",
)

W4A16 = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=32
    ),
)
IGNORED = ["lm_head", "re:.*vision_tower.*", "re:.*embed_vision.*"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    recipe = QuantizationModifier(config_groups={"group_0": W4A16}, ignore=IGNORED)
    model = AutoModelForImageTextToText.from_pretrained(args.source, dtype=torch.bfloat16)
    oneshot(model=model, recipe=recipe)
    model.save_pretrained(args.out, save_compressed=True)
    for name in SIDE_FILES:
        shutil.copy(args.source / name, args.out)
    # safetensors writes files that only their owner can read.
    (args.out / "model.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
