"""Attention over the cache alone: prompts beside PyTorch's, and the bytes that decoding reads.

    python bench/attention.py [--threads 1]

A layer whose matrices are tiny, so that attention is what takes its time. Processor seconds, the
least of some rounds; with one thread they mean something on a machine that is not idle.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from lone_layer import CPU, Lone, attending, config, lone_layer
from test_kernels_attention import make

from cabochon.engine.cache import CachePlan, CacheStep, Chunk, PagedCache
from cabochon.gemma4.text import LayerCall
from cabochon.kernels.library import library
from cabochon.nn.rotary import text_rotation

HIDDEN, PROMPT, CHUNK, CONTEXT, DECODED = 64, 2048, 512, 4096, 40
SHAPES = {  # heads, kv_heads, head_dim, window
    "E2B sliding": (8, 1, 256, 512),
    "E2B full": (8, 1, 512, None),
    "26B-A4B sliding": (16, 8, 256, 1024),
    "26B-A4B full": (16, 2, 512, None),
}
KINDS = {"float16": torch.float16, "float32": torch.float32, "int8": torch.int8}


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


class Run:
    """One sequence after the other through the layer."""

    def __init__(self, lone: Lone, dtype: torch.dtype) -> None:
        plan = CachePlan.fit(lone.text, dtype, 1 << 30, 1, CHUNK, 2 * CONTEXT)
        self.layer, self.rope = lone.text.layers[0], lone.text.rope
        self.cache = PagedCache(plan, dtype, CPU)
        self.table = self.cache.new_table()

    def restart(self) -> None:
        self.cache.release(self.table)
        self.table = self.cache.new_table()

    def step(self, compute: LayerCall, start: int, stop: int) -> None:
        chunk = Chunk(self.table, start, stop)
        assert self.cache.reserve(chunk)
        rope, dim = self.rope[self.layer.kind], self.layer.head_dim
        rotation = text_rotation(torch.arange(start, stop), dim, rope, torch.float32)
        x = torch.randn(stop - start, HIDDEN)
        compute(x, None, rotation, CacheStep(self.cache, [chunk]))
        self.cache.settle(self.table, stop)

    def prompt(self, compute: LayerCall, length: int) -> None:
        self.restart()
        for start in range(0, length, CHUNK):
            self.step(compute, start, start + CHUNK)

    def decode(self, compute: LayerCall) -> None:
        for position in range(CONTEXT, CONTEXT + DECODED):
            self.step(compute, position, position + 1)


def measure(lone: Lone, dtype: torch.dtype) -> tuple[float, float, float]:
    """Seconds of a prompt in one call and in PyTorch, and of one query behind a context."""
    run = Run(lone, dtype)
    ours = seconds(lambda: run.prompt(lone.fused, PROMPT))
    theirs = seconds(lambda: run.prompt(lone.module, PROMPT))
    run.prompt(lone.fused, CONTEXT)
    return ours, theirs, seconds(lambda: run.decode(lone.fused), 1) / DECODED


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    kernels = library()
    assert kernels is not None
    for name, (heads, kv_heads, dim, window) in SHAPES.items():
        layer = attending(kv_heads=kv_heads, head_dim=dim, window=window)
        lone = lone_layer(config(layer, hidden=HIDDEN, heads=heads), make, kernels, "int8")
        for kind, dtype in KINDS.items():
            ours, theirs, once = measure(lone, dtype)
            read = 2 * min(CONTEXT, window or CONTEXT) * kv_heads * dim * dtype.itemsize
            print(
                f"{name:16} {kind:8} prompt of {PROMPT}: {ours * 1e3:6.0f} ms, PyTorch"
                f" {theirs * 1e3:6.0f} ms, {theirs / ours:4.1f} times; one query behind {CONTEXT}:"
                f" {once * 1e3:5.2f} ms, {read / once / 1e9:5.1f} GB/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
