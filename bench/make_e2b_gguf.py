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
from gguf import GGMLQuantizationType as Type
from random_gguf import NARROW, VOCAB, WIDE, Named, write

LAYERS, SHARED, HIDDEN, OWN, HEADS, INNER = 35, 20, 1536, 256, 8, 6144


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--embedding", choices=("Q6_K", "Q4_0", "BF16"), default="Q6_K")
    arguments = parser.parse_args()
    write(arguments.out, describe, shapes(Type[arguments.embedding]))


def describe(writer: gguf.GGUFWriter) -> None:
    sliding = [(i + 1) % 5 != 0 for i in range(LAYERS)]
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(
        [INNER if i < LAYERS - SHARED else 2 * INNER for i in range(LAYERS)]
    )
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_sliding_window(512)
    writer.add_uint32("gemma4.attention.shared_kv_layers", SHARED)
    writer.add_uint32("gemma4.embedding_length_per_layer_input", OWN)
    writer.add_array("gemma4.attention.sliding_window_pattern", sliding)


def shapes(embedding: Type) -> Iterator[Named]:
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


if __name__ == "__main__":
    main()
