"""Write a random checkpoint of the real E2B shape: W4A16 group 32, 4.6 billion parameters, 7 GB.

    python bench/make_e2b.py OUT

For measuring loading, memory and speed; the answers mean nothing. Embeddings and the vision tower
are bfloat16 and everything else in the text model is packed, as in Google's own W4A16 release. It
is laid out by the product's own statement of what the model needs and written in pieces, so that a
machine with little memory can make it. Sizes of the model: Google's published E2B configuration.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cabochon.config import parse_config
from cabochon.load.tree import VISION, Parameter, needed
from cabochon.quant.packed_int import PackedInt
from cabochon.quant.scheme import Dense, Scheme, Site

VOCAB = 262_144
LAYERS = 35
SHARD_BYTES = 2 << 30
CHUNK = 64 << 20  # values made at once
SPECIAL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<|turn>": 105,
    "<turn|>": 106,
    "<|image>": 255_999,
    "<|image|>": 258_880,
    "<image|>": 258_882,
}
DTYPES = {torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64"}

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{{- '<|image|>' if part.type == 'image' else part.text -}}
{%- endfor -%}
{%- endif -%}
{{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write, and how to make a run of its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: Callable[[Tensor], object]  # of a flat tensor, in place

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path, help="the folder to write")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = configuration()
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards(config), start=1):
        shard = f"model-{number:05d}.safetensors"
        with (out / shard).open("wb") as file:
            write(file, entries)
        weight_map |= {entry.name: shard for entry in entries}
        print(shard, f"{sum(entry.nbytes for entry in entries) / 1e9:.2f} GB", flush=True)
    texts = {
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}),
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps({"bos_token_id": 2, "eos_token_id": [1, 106]}),
        "processor_config.json": json.dumps(processor(), indent=2),
        "tokenizer.json": json.dumps(tokenizer()),
        "tokenizer_config.json": json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}),
        "chat_template.jinja": TEMPLATE,
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")


def configuration() -> Mapping[str, Any]:
    text = {
        "model_type": "gemma4_text",
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size": 1536,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 6144,
        "use_double_wide_mlp": True,
        "num_hidden_layers": LAYERS,
        "num_kv_shared_layers": 20,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 512,
        "max_position_embeddings": 131_072,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 64,
        "patch_size": 16,
        "pooling_kernel_size": 3,
        "position_embedding_size": 10_240,
        "use_clipped_linears": True,
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": vision,
        "audio_config": None,
        "boi_token_id": SPECIAL["<|image>"],
        "image_token_id": SPECIAL["<|image|>"],
        "eoi_token_id": SPECIAL["<image|>"],
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "format": "pack-quantized",
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": 32,
                    },
                }
            },
            "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*embed_vision.*"],
        },
    }


def shards(config: Mapping[str, Any]) -> Iterator[list[Entry]]:
    """The tensors, in files of about two gigabytes; one larger than that has a file to itself."""
    shard: list[Entry] = []
    for entry in entries_of(config):
        if shard and sum(e.nbytes for e in shard) + entry.nbytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def entries_of(config: Mapping[str, Any]) -> Iterator[Entry]:
    tree = needed(parse_config(config), has_head=False)
    for site in tree.sites:
        plain = site.kind == "embedding" or site.name.startswith((VISION, "model.embed_vision"))
        yield from matrix(site, Dense("BF16") if plain else PackedInt(4, 32, symmetric=True))
    for parameter in tree.parameters:
        fill = partial(torch.Tensor.fill_, value=value(parameter))
        yield Entry(parameter.name, torch.bfloat16, parameter.shape, fill)


def matrix(site: Site, scheme: Scheme) -> Iterator[Entry]:
    """The tensors of one matrix, whose entries have the spread that keeps activations near one."""
    spread = 0.03 if site.kind == "embedding" else site.in_features**-0.5
    bound = spread * 3**0.5
    scale = spread / 4.6  # the spread of uniform 4-bit codes
    fills: Mapping[str, tuple[torch.dtype, Callable[[Tensor], object]]] = {
        "matrix": (torch.bfloat16, lambda t: t.uniform_(-bound, bound)),
        "codes": (torch.int32, lambda t: t.random_(-(2**31), 2**31)),
        "scales": (torch.bfloat16, lambda t: t.uniform_(0.8 * scale, 1.2 * scale)),
        "shape": (
            torch.int64,
            lambda t: t.copy_(torch.tensor([site.out_features, site.in_features])),
        ),
    }
    for slot in scheme.slots:
        dtype, fill = fills[slot.holds]
        shape = tuple(site.extent(axis) for axis in slot.axes)
        yield Entry(f"{site.name}.{slot.leaf}", dtype, shape, fill)


def value(parameter: Parameter) -> float:
    """Ones, but small where unscaled attention would be one-hot; bounds that do not clip."""
    leaf = parameter.name.rpartition(".")[2]
    if parameter.bound:
        return -100.0 if leaf.endswith("min") else 100.0
    if parameter.name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.4
    return {"layer_scalar": 0.5, "position_embedding_table": 0.01}.get(leaf, 1.0)


def write(file: BinaryIO, entries: list[Entry]) -> None:
    """One safetensors file: the header, then each tensor in pieces."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        span = [end, end + entry.nbytes]
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": span,
        }
        end = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for entry in entries:
        left = math.prod(entry.shape)
        while left:
            piece: Tensor = torch.empty(min(left, CHUNK), dtype=entry.dtype)
            entry.fill(piece)
            file.write(piece.view(torch.uint8).numpy().data)
            left -= len(piece)


def processor() -> Mapping[str, Any]:
    return {
        "processor_class": "Gemma4Processor",
        "image_processor": {
            "image_processor_type": "Gemma4ImageProcessor",
            "max_soft_tokens": 280,
            "patch_size": 16,
            "pooling_kernel_size": 3,
        },
    }


def tokenizer() -> Mapping[str, Any]:
    """Bytes and nothing longer, padded with names that no text contains to the real vocabulary."""
    octets = {f"<0x{octet:02X}>": 238 + octet for octet in range(256)}  # where Gemma has them
    named = {number: name for name, number in (SPECIAL | octets).items()}
    vocab = {named.get(number, f"<unused{number}>"): number for number in range(VOCAB)}
    added = [
        {
            "id": number,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, number in SPECIAL.items()
    ]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": space,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [],
        },
    }


if __name__ == "__main__":
    main()
