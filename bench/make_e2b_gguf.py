"""Write a random GGUF of the real E2B shape: Q4_0, 4.6 billion parameters.

    python bench/make_e2b_gguf.py OUT.gguf [--embedding Q6_K]

For measuring speed beside llama.cpp on the very same file; the answers mean nothing. Matrices are
Q4_0; the token table, which is the head too, is what `--embedding` says, Q6_K as llama.cpp's own
quantizer makes it; per-layer embeddings are Q4_0. Sizes of the model: Google's published E2B.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

VOCAB, LAYERS, SHARED, HIDDEN, OWN = 262_144, 35, 20, 1536, 256
HEADS, NARROW, WIDE, INNER = 8, 256, 512, 6144
CONTROL, BYTE, NORMAL = 3, 6, 1
FIRST, LETTERS = 1000, 512  # the first token that is text, and those that are one character

# Bytes of a scale in a block: where it lies and what makes entries of ordinary size.
SCALES = {Type.Q4_0: (0, 1 / 4.6), Type.Q6_K: (208, 1 / (18.5 * 60))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--embedding", choices=("Q6_K", "Q4_0", "BF16"), default="Q6_K")
    arguments = parser.parse_args()
    writer = gguf.GGUFWriter(arguments.out, "gemma4", use_temp_file=False)
    describe(writer)
    tensors = list(shapes(Type[arguments.embedding]))
    for name, shape, kind in tensors:
        size = stored(shape, kind)
        # gguf-py takes the shape of the bytes of quantized matrices
        octets = gguf.quant_shape_to_byte_shape(shape, kind) if kind is not Type.F32 else shape
        dtype = np.dtype(np.float32 if kind is Type.F32 else np.uint8)
        writer.add_tensor_info(name, octets, dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for name, shape, kind in tensors:
        writer.write_tensor_data(values(name, shape, kind, rng))
    writer.close()


def describe(writer: gguf.GGUFWriter) -> None:
    sliding = [(i + 1) % 5 != 0 for i in range(LAYERS)]
    writer.add_block_count(LAYERS)
    writer.add_context_length(131_072)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(
        [INNER if i < LAYERS - SHARED else 2 * INNER for i in range(LAYERS)]
    )
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(1e6)
    writer.add_float32("gemma4.rope.freq_base_swa", 1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(WIDE)
    writer.add_value_length(WIDE)
    writer.add_final_logit_softcapping(30.0)
    writer.add_sliding_window(512)
    writer.add_uint32("gemma4.attention.shared_kv_layers", SHARED)
    writer.add_uint32("gemma4.embedding_length_per_layer_input", OWN)
    writer.add_array("gemma4.attention.sliding_window_pattern", sliding)
    writer.add_uint32("gemma4.attention.key_length_swa", NARROW)
    writer.add_uint32("gemma4.attention.value_length_swa", NARROW)
    writer.add_rope_dimension_count(WIDE)
    writer.add_uint32("gemma4.rope.dimension_count_swa", NARROW)
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


def shapes(embedding: Type) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """Names, shapes `[rows, columns]` and types, in the order of the file."""
    q4, f32 = Type.Q4_0, Type.F32
    yield "rope_freqs.weight", (WIDE // 2,), f32
    yield "token_embd.weight", (VOCAB, HIDDEN), embedding
    yield "per_layer_token_embd.weight", (VOCAB, LAYERS * OWN), q4
    for i in range(LAYERS):
        head = NARROW if (i + 1) % 5 else WIDE
        inner = INNER if i < LAYERS - SHARED else 2 * INNER
        for name in ("attn_norm", "post_attention_norm", "post_ffw_norm", "post_norm", "ffn_norm"):
            yield f"blk.{i}.{name}.weight", (HIDDEN,), f32
        yield f"blk.{i}.layer_output_scale.weight", (1,), f32
        yield f"blk.{i}.attn_q_norm.weight", (head,), f32
        yield f"blk.{i}.attn_q.weight", (HEADS * head, HIDDEN), q4
        if i < LAYERS - SHARED:
            yield f"blk.{i}.attn_k_norm.weight", (head,), f32
            yield f"blk.{i}.attn_k.weight", (head, HIDDEN), q4
            yield f"blk.{i}.attn_v.weight", (head, HIDDEN), q4
        yield f"blk.{i}.attn_output.weight", (HIDDEN, HEADS * head), q4
        yield f"blk.{i}.ffn_gate.weight", (inner, HIDDEN), q4
        yield f"blk.{i}.ffn_up.weight", (inner, HIDDEN), q4
        yield f"blk.{i}.ffn_down.weight", (HIDDEN, inner), q4
        yield f"blk.{i}.inp_gate.weight", (OWN, HIDDEN), q4
        yield f"blk.{i}.proj.weight", (HIDDEN, OWN), q4
    yield "output_norm.weight", (HIDDEN,), f32
    yield "per_layer_model_proj.weight", (LAYERS * OWN, HIDDEN), q4
    yield "per_layer_proj_norm.weight", (OWN,), f32


def stored(shape: tuple[int, ...], kind: Type) -> int:
    entries, octets = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // entries * octets


def values(name: str, shape: tuple[int, ...], kind: Type, rng: np.random.Generator) -> np.ndarray:
    """Entries whose spread keeps activations near one; norms as in make_e2b.py."""
    if kind is Type.F32:
        leaf = name.split(".")[-2]
        if name == "rope_freqs.weight":  # a quarter of the pairs turns
            return np.repeat(np.float32([1.0, 1e30]), [WIDE // 8, WIDE // 2 - WIDE // 8])
        if leaf.startswith("layer_output"):
            return np.full(shape, 0.5, np.float32)
        return np.full(shape, 0.4 if leaf in ("attn_q_norm", "attn_k_norm") else 1.0, np.float32)
    spread = 0.03 if "embd" in name else shape[1] ** -0.5
    if kind is Type.BF16:
        wide = rng.standard_normal(shape, np.float32) * np.float32(spread)
        return (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    _, octets = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 2**64, stored(shape, kind) // 8, np.uint64).view(np.uint8)
    blocks = blocks.reshape(-1, octets)
    at, unit = SCALES[kind]
    blocks[:, at : at + 2] = np.float16([spread * unit]).view(np.uint8)
    return blocks.reshape(shape[0], -1)


if __name__ == "__main__":
    main()
