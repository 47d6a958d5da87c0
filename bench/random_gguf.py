"""Random GGUF files in the shape of a Gemma 4: what the scripts `make_*_gguf.py` have in common.

For measuring speed beside llama.cpp on the very same file; the answers mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

VOCAB, NARROW, WIDE = 262_144, 256, 512  # tokens; sizes of a head of sliding and of full layers
CONTROL, BYTE, NORMAL = 3, 6, 1
FIRST, LETTERS = 1000, 512  # the first token that is text, and those that are one character

Named = tuple[str, tuple[int, ...], Type]  # a tensor: `[rows, columns]`, and how it is stored

# Bytes of a scale in a block: where it lies and what makes entries of ordinary size.
SCALES = {Type.Q4_0: (0, 1 / 4.6), Type.Q6_K: (208, 1 / (18.5 * 60))}


def write(
    path: Path, describe: Callable[[gguf.GGUFWriter], None], tensors: Iterable[Named]
) -> None:
    """A file of `tensors`, in their order, under metadata that `describe` adds to the common."""
    writer = gguf.GGUFWriter(path, "gemma4", use_temp_file=False)
    describe(writer)
    _describe_heads(writer)
    _describe_tokenizer(writer)
    tensors = list(tensors)
    for name, shape, kind in tensors:
        # gguf-py takes the shape of the bytes of quantized matrices
        octets = gguf.quant_shape_to_byte_shape(shape, kind) if kind is not Type.F32 else shape
        dtype = np.dtype(np.float32 if kind is Type.F32 else np.uint8)
        writer.add_tensor_info(name, octets, dtype, _stored(shape, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for name, shape, kind in tensors:
        writer.write_tensor_data(_values(name, shape, kind, rng))
    writer.close()


def _describe_heads(writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(131_072)
    writer.add_rope_freq_base(1e6)
    writer.add_float32("gemma4.rope.freq_base_swa", 1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(WIDE)
    writer.add_value_length(WIDE)
    writer.add_final_logit_softcapping(30.0)
    writer.add_uint32("gemma4.attention.key_length_swa", NARROW)
    writer.add_uint32("gemma4.attention.value_length_swa", NARROW)
    writer.add_rope_dimension_count(WIDE)
    writer.add_uint32("gemma4.rope.dimension_count_swa", NARROW)


def _describe_tokenizer(writer: gguf.GGUFWriter) -> None:
    named = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 105: "<|turn>", 106: "<turn|>"}
    named |= {500: "\u2581", 501: "t", 502: "\u2581t"}
    # As in a real vocabulary, merges make all but a few tokens: that decides how long it is read.
    letters = [chr(0x4E00 + i) for i in range(LETTERS)]
    pairs = [(a, b) for a in letters for b in letters][: VOCAB - FIRST - LETTERS]
    tokens = [named.get(i, f"<unused{i}>") for i in range(FIRST)]
    tokens += [*letters, *(a + b for a, b in pairs)]
    kinds = [CONTROL if i < 200 else NORMAL for i in range(VOCAB)]
    for octet in range(256):
        tokens[238 + octet], kinds[238 + octet] = f"<0x{octet:02X}>", BYTE
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * VOCAB)
    writer.add_token_types(kinds)
    writer.add_token_merges(["\u2581 t", *(f"{a} {b}" for a, b in pairs)])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    writer.add_chat_template(
        "{{- bos_token -}}{%- for m in messages -%}{{- m.content -}}{%- endfor -%}"
    )


def _stored(shape: tuple[int, ...], kind: Type) -> int:
    entries, octets = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // entries * octets


def _values(name: str, shape: tuple[int, ...], kind: Type, rng: np.random.Generator) -> np.ndarray:
    """Entries whose spread keeps activations near one; norms as in make_e2b.py."""
    if name == "rope_freqs.weight":  # a quarter of the pairs turns
        return np.repeat(np.float32([1.0, 1e30]), [WIDE // 8, WIDE // 2 - WIDE // 8])
    spread = np.float32(0.03 if "embd" in name else shape[-1] ** -0.5)
    if kind is Type.F32:
        if len(shape) > 1:
            return rng.standard_normal(shape, np.float32) * spread
        leaf = name.split(".")[-2]
        if leaf.startswith("layer_output"):
            return np.full(shape, 0.5, np.float32)
        return np.full(shape, 0.4 if leaf in ("attn_q_norm", "attn_k_norm") else 1.0, np.float32)
    if kind is Type.BF16:
        wide = rng.standard_normal(shape, np.float32) * spread
        return (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    _, octets = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 2**64, _stored(shape, kind) // 8, np.uint64).view(np.uint8)
    blocks = blocks.reshape(-1, octets)
    at, unit = SCALES[kind]
    blocks[:, at : at + 2] = np.float16([spread * unit]).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)
