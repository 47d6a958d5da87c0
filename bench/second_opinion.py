"""Compare our logits with llama.cpp's on the same model: an opinion that owes nothing to PyTorch.

    python bench/second_opinion.py CHECKPOINT MODEL.gguf

CHECKPOINT is a folder; MODEL.gguf is what llama.cpp's `convert_hf_to_gguf.py` makes of it, with
`--outtype bf16` or `f32`. With bf16 weights llama.cpp rounds activations to bfloat16 in each
product: where two experts are close it then chooses the other one, and differs at such tokens.

Needs `pip install llama-cpp-python`. Text only: random tokens, more than a sliding window of them.
Prints the least and the mean cosine over the positions, and how often both find the same token
likeliest; exits with 1 below a cosine of 0.999.
"""

from __future__ import annotations

import argparse
import random
import sys

import numpy as np
import torch
from llama_cpp import GGML_TYPE_F32, Llama
from torch.nn.functional import cosine_similarity

from cabochon import LLM

TOKENS = 200
LEAST_COSINE = 0.999


def ordinary_tokens(llm: LLM, count: int) -> list[int]:
    """A beginning-of-sequence token and random ones that stand for text."""
    tokenizer = llm.prompts.tokenizer
    usable = [i for i in range(llm.config.text.vocab_size) if i not in tokenizer.special]
    return [2, *random.Random(0).choices(usable, k=count - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("gguf")
    arguments = parser.parse_args()
    with LLM(arguments.checkpoint, dtype="float32") as llm:
        tokens = ordinary_tokens(llm, TOKENS)
        ours = llm.logits(tokens)
    peer = Llama(
        arguments.gguf,
        n_ctx=512,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    peer.eval(tokens)
    theirs = torch.from_numpy(np.array(peer.scores[: len(tokens)]))
    cosines = cosine_similarity(ours, theirs, dim=-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    print(
        f"cosine: least {cosines.min():.6f}, mean {cosines.mean():.6f}; likeliest equal {same:.1%}"
    )
    sys.exit(int(cosines.min() < LEAST_COSINE))


if __name__ == "__main__":
    main()
