"""Write a random drafter of the real shape: `python bench/make_drafter.py OUT e2b|12b|26b`.

For measuring what guesses cost; they mean nothing. It is laid out by the product's own statement of
what a drafter needs, in bfloat16. Sizes: Google's published configurations of the drafters.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cabochon.config import parse_config
from cabochon.load.tree import needed

KINDS = ["sliding_attention"] * 3 + ["full_attention"]
SIZES: dict[str, dict[str, Any]] = {
    "e2b": {
        "backbone_hidden_size": 1536,
        "use_ordered_embeddings": True,
        "text_config": {
            "hidden_size": 256,
            "intermediate_size": 2048,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
        },
    },
    "26b": {
        "backbone_hidden_size": 2816,
        "text_config": {
            "hidden_size": 1024,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "max_position_embeddings": 262_144,
        },
    },
    "12b": {
        "backbone_hidden_size": 3840,
        "text_config": {
            "hidden_size": 1024,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": 1024,
            "max_position_embeddings": 262_144,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("target", choices=SIZES)
    args = parser.parse_args()
    family = "Gemma4Unified" if args.target == "12b" else "Gemma4"
    described = {"architectures": [f"{family}AssistantForCausalLM"], **SIZES[args.target]}
    described["text_config"] |= {"num_hidden_layers": len(KINDS), "layer_types": KINDS}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    torch.manual_seed(0)
    tree, tensors = needed(parse_config(described), has_head=False), {}
    for site in tree.sites:
        matrix = torch.randn(site.out_features, site.in_features) * site.in_features**-0.5
        tensors[f"{site.name}.weight"] = matrix.bfloat16()
    for parameter in tree.parameters:
        count = parameter.shape[0]
        norm = torch.rand(parameter.shape).add(0.5).bfloat16()
        tensors[parameter.name] = torch.randperm(count) if parameter.order else norm
    named = {name.replace("model.language_model.", "model."): t for name, t in tensors.items()}
    save_file(named, args.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
