"""A decoder layer of any sizes with a cache of its own, for comparing kernels with modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cabochon.config import ExpertsConfig, LayerConfig, RopeConfig, TextConfig
from cabochon.engine.cache import CachePlan, CacheStep, Chunk, PagedCache
from cabochon.gemma4.text import DecoderLayer
from cabochon.kernels.choose import Kernels
from cabochon.kernels.layers import FusedLayer
from cabochon.kernels.library import Activations, Library
from cabochon.nn.attention import KeyValues
from cabochon.nn.linear import Linear
from cabochon.nn.rotary import text_rotation
from cabochon.nn.weight import Stack, Weight

Make = Callable[[str, int, int], Weight]  # name, rows, columns
Spans = Sequence[tuple[int, int]]


def config(
    layer: LayerConfig, *, hidden: int, heads: int, experts: ExpertsConfig | None = None
) -> TextConfig:
    rope = RopeConfig(theta=10_000.0)
    full = replace(layer, index=1, kind="full", window=None, kv_source=1)
    return TextConfig(
        vocab_size=10,
        hidden_size=hidden,
        num_heads=heads,
        layers=(layer, full) if layer.window else (layer,),
        experts=experts,
        rope={"sliding": rope, "full": rope},
        eps=1e-6,
        softcap=None,
        ple_dim=0,
        ple_vocab_size=0,
        max_positions=1 << 17,
        pad_token_id=0,
    )


def attending(
    *,
    kv_heads: int,
    head_dim: int,
    window: int | None = None,
    dense: int = 64,
    sight: str = "causal",
) -> LayerConfig:
    return LayerConfig(
        index=0,
        kind="full" if window is None else "sliding",
        head_dim=head_dim,
        kv_heads=kv_heads,
        k_eq_v=False,
        intermediate_size=dense,
        window=window,
        pictures=sight,
        shares_kv=False,
        kv_source=0,
    )


@dataclass
class Lone:
    """The layer as its modules compute it, exactly, and the same in one call."""

    module: DecoderLayer
    fused: FusedLayer
    text: TextConfig


def lone_layer(text: TextConfig, make: Make, library: Library, activations: Activations) -> Lone:
    module, twin = DecoderLayer(text, text.layers[0]), DecoderLayer(text, text.layers[0])
    for parameter in [*module.parameters(), *module.buffers()]:
        parameter.data = torch.rand_like(parameter) * 0.5 + 0.75
    twin.load_state_dict(module.state_dict())
    kernels = Kernels(library, activations)
    both = zip(list(module.named_modules()), list(twin.modules()), strict=True)
    for (name, one), other in both:
        if isinstance(one, Linear):
            assert isinstance(other, Linear)
            one.weight = make(name, one.out_features, one.in_features)
            other.weight = kernels.for_weight(_copy(one.weight))
    return Lone(module.eval(), FusedLayer(library, twin.eval()), text)


def _copy(weight: Weight) -> Weight:
    """Another module of the same parts: choosing kernels changes stacks in place."""
    if not isinstance(weight, Stack):
        return weight
    return Stack([part for part in weight.parts if isinstance(part, Weight)])


@torch.inference_mode()
def run(
    lone: Lone,
    steps: Sequence[Sequence[tuple[int, Tensor]]],
    dtype: torch.dtype = torch.float32,
    pictures: Spans = (),
) -> tuple[Tensor, Tensor]:
    """Steps of `(sequence, rows)`: what the modules and what the one call make of all rows."""
    made: list[list[Tensor]] = [[], []]
    layer = lone.text.layers[0]
    for compute, out in zip((lone.module, lone.fused), made, strict=True):
        cache = PagedCache(CachePlan.fit(lone.text, dtype, 1 << 30, 8, 512, 8192), dtype, CPU)
        tables = [cache.new_table() for _ in range(8)]
        lengths = [0] * 8
        for step in steps:
            chunks, positions = [], []
            for sequence, rows in step:
                start = lengths[sequence]
                stop = lengths[sequence] = start + len(rows)
                inside = tuple(span for span in pictures if start <= span[0] and span[1] <= stop)
                chunks.append(Chunk(tables[sequence], start, stop, inside))
                assert cache.reserve(chunks[-1])
                positions.append(torch.arange(start, stop))
            kv: KeyValues = CacheStep(cache, chunks)
            rotation = text_rotation(
                torch.cat(positions), layer.head_dim, lone.text.rope[layer.kind], torch.float32
            )
            x = torch.cat([rows for _, rows in step])
            out.append(compute(x, None, rotation, kv))
            for chunk in chunks:
                cache.settle(chunk.table, chunk.stop)
    return torch.cat(made[0]), torch.cat(made[1])


CPU = torch.device("cpu")


def relative(made: Tensor, expected: Tensor) -> Tensor:
    """How far each row is off, beside its length."""
    return (made - expected).norm(dim=-1) / expected.norm(dim=-1)
