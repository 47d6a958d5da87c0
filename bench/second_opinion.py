"""Compare our logits with llama.cpp's on the same model: an opinion that owes nothing to PyTorch.

    python bench/second_opinion.py CHECKPOINT MODEL.gguf
    python bench/second_opinion.py --decoded MODEL.gguf MODEL.gguf

CHECKPOINT is a folder; MODEL.gguf is what llama.cpp's `convert_hf_to_gguf.py` makes of it, with
`--outtype bf16` or `f32`. Or both are the same GGUF file, which ours then reads itself.

With quantized weights llama.cpp quantizes what goes into each product too, to 8 bits. `--decoded`
has it decode the file to float32 first, with its own code, so that what is compared is what the
weights mean.

With bf16 weights llama.cpp rounds what goes into each product to bfloat16, though not in front of
the router, and it always looks GELU up in a table of float16s. In a mixture of experts that is no
small change: where two experts are close it runs the other one. `--its-rounding` has ours round in
the same places, so that what is compared is the model.

Needs `pip install llama-cpp-python`. Text only: random tokens, more than a sliding window of them.
Prints the least and the mean cosine over the positions, and how often both find the same token
likeliest; exits with 1 below a cosine of 0.999.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import tempfile

import llama_cpp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cabochon import LLM
from cabochon.nn.linear import Linear
from cabochon.nn.weight import Weight

TOKENS = 200
LEAST_COSINE = 0.999
ALL_F32 = 0  # of llama.cpp's file types, and of ggml's types


def ordinary_tokens(llm: LLM, count: int) -> list[int]:
    """A beginning-of-sequence token and random ones that stand for text."""
    tokenizer = llm.prompts.tokenizer
    usable = [i for i in range(llm.config.text.vocab_size) if i not in tokenizer.special]
    return [2, *random.Random(0).choices(usable, k=count - 1)]


class Bf16Inputs(Weight):
    """A weight whose products see their other factor in bfloat16."""

    def __init__(self, weight: Weight) -> None:
        super().__init__(weight.out_features, weight.in_features)
        self.weight = weight

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self.weight.rows(ids, dtype)

    def linear(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        return self.weight.linear(x.bfloat16().to(x.dtype), start, stop)


exact_gelu = F.gelu


def gelu_of_float16(x: Tensor, approximate: str) -> Tensor:
    """GELU as a table of float16s has it, which is left alone far from zero."""
    y = exact_gelu(x.half().float(), approximate=approximate).half().float()
    return torch.where(x.abs() < 10, y, x.relu())


def round_alike(model: nn.Module) -> None:
    """Have `model`, whose matrices are bfloat16, round wherever llama.cpp does."""
    F.gelu = gelu_of_float16
    for name, module in model.named_modules():
        holds = isinstance(module, Linear) or name.endswith("embed_tokens")
        if holds and not name.endswith("router.proj"):
            module.weight = Bf16Inputs(module.weight)


def decode(source: str, target: str) -> str:
    """A copy of a GGUF file in which llama.cpp has made float32 of every matrix."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.pure = ALL_F32, True, True
    params.output_tensor_type = params.token_embedding_type = ALL_F32
    done = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    assert done == 0
    return target


def opinion(path: str, tokens: list[int]) -> Tensor:
    """llama.cpp's logits at every position."""
    peer = llama_cpp.Llama(
        path,
        n_ctx=512,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    peer.eval(tokens)
    return torch.from_numpy(np.array(peer.scores[: len(tokens)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("gguf")
    parser.add_argument("--its-rounding", action="store_true", help="round where llama.cpp does")
    parser.add_argument("--decoded", action="store_true", help="let it decode the weights first")
    arguments = parser.parse_args()
    with LLM(arguments.checkpoint, dtype="float32") as llm:
        if arguments.its_rounding:
            round_alike(llm.runner.model)
        tokens = ordinary_tokens(llm, TOKENS)
        ours = llm.logits(tokens)
    with tempfile.TemporaryDirectory() as room:
        path = arguments.gguf
        path = decode(path, f"{room}/decoded.gguf") if arguments.decoded else path
        theirs = opinion(path, tokens)
    cosines = F.cosine_similarity(ours, theirs, dim=-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    print(
        f"cosine: least {cosines.min():.6f}, mean {cosines.mean():.6f}; likeliest equal {same:.1%}"
    )
    sys.exit(int(cosines.min() < LEAST_COSINE))


if __name__ == "__main__":
    main()
