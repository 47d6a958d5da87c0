"""Write a random GGUF of the real 26B-A4B shape with fewer layers: Q4_0, 128 experts a layer.

    python bench/make_26b_gguf.py OUT.gguf [--layers 6]

For measuring speed beside llama.cpp on the very same file; the answers mean nothing. Matrices are
Q4_0, the token table, which is the head too, is Q6_K, and routers are float32. Every sixth layer
sees all tokens, as in the real model, which has 30. Sizes: Google's published 26B-A4B.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Type
from random_gguf import NARROW, VOCAB, WIDE, Named, write

HIDDEN, HEADS, INNER, EXPERTS, CHOSEN, EXPERT = 2816, 16, 2112, 128, 8, 704
SLIDING_KV, FULL_KV = 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=6, help="a multiple of 6")
    arguments = parser.parse_args()
    sliding = [(i + 1) % 6 != 0 for i in range(arguments.layers)]

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(len(sliding))
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv([SLIDING_KV if near else FULL_KV for near in sliding])
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(CHOSEN)
        writer.add_expert_feed_forward_length(EXPERT)
        writer.add_sliding_window(1024)
        writer.add_uint32("gemma4.attention.shared_kv_layers", 0)
        writer.add_uint32("gemma4.embedding_length_per_layer_input", 0)
        writer.add_array("gemma4.attention.sliding_window_pattern", sliding)

    write(arguments.out, describe, shapes(sliding))


def shapes(sliding: list[bool]) -> Iterator[Named]:
    """Names, shapes `[rows, columns]` and types, in the order of the file."""
    q4, f32 = Type.Q4_0, Type.F32
    yield "rope_freqs.weight", (WIDE // 2,), f32
    yield "token_embd.weight", (VOCAB, HIDDEN), Type.Q6_K
    for i, near in enumerate(sliding):
        head, kv = (NARROW, SLIDING_KV) if near else (WIDE, FULL_KV)
        for name in (
            *("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"),
            *("post_ffw_norm_1", "pre_ffw_norm_2", "post_ffw_norm_2"),
        ):
            yield f"blk.{i}.{name}.weight", (HIDDEN,), f32
        yield f"blk.{i}.layer_output_scale.weight", (1,), f32
        yield f"blk.{i}.attn_q_norm.weight", (head,), f32
        yield f"blk.{i}.attn_k_norm.weight", (head,), f32
        yield f"blk.{i}.attn_q.weight", (HEADS * head, HIDDEN), q4
        yield f"blk.{i}.attn_k.weight", (kv * head, HIDDEN), q4
        if near:  # a full layer's keys are its values
            yield f"blk.{i}.attn_v.weight", (kv * head, HIDDEN), q4
        yield f"blk.{i}.attn_output.weight", (HIDDEN, HEADS * head), q4
        yield f"blk.{i}.ffn_gate.weight", (INNER, HIDDEN), q4
        yield f"blk.{i}.ffn_up.weight", (INNER, HIDDEN), q4
        yield f"blk.{i}.ffn_down.weight", (HIDDEN, INNER), q4
        yield f"blk.{i}.ffn_gate_inp.weight", (EXPERTS, HIDDEN), f32
        yield f"blk.{i}.ffn_gate_inp.scale", (HIDDEN,), f32
        yield f"blk.{i}.ffn_gate_up_exps.weight", (EXPERTS, 2 * EXPERT, HIDDEN), q4
        yield f"blk.{i}.ffn_down_exps.weight", (EXPERTS, HIDDEN, EXPERT), q4
        yield f"blk.{i}.ffn_down_exps.scale", (EXPERTS,), f32
    yield "output_norm.weight", (HIDDEN,), f32


if __name__ == "__main__":
    main()
