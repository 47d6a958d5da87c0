"""The producers whose files are understood: a row each, a module each.

`rules` reads a producer's configuration, for the values of `quant_method` that are its own.
`candidates` looks at the tensors of one matrix alone; most families see at once that it is not
theirs, and what they propose is tried, never believed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cabochon.checkpoint.headers import TensorMeta
from cabochon.quant import (
    auto_round,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gemma,
    gguf,
    gptq,
    mlx,
    modelopt,
    torchao,
)
from cabochon.quant.claims import Rules
from cabochon.quant.scheme import Scheme, Site


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    methods: frozenset[str]  # values of quant_method
    rules: Callable[[str, Mapping[str, Any]], Rules]  # of the configuration, which has this key
    candidates: Callable[[Site, Mapping[str, TensorMeta]], Iterable[Scheme]]


def nothing_else(site: Site, stored: Mapping[str, TensorMeta]) -> Iterable[Scheme]:
    """Of a producer whose tensors are those of others."""
    del site, stored
    return ()


FAMILIES = (
    Family(
        "compressed-tensors",
        frozenset({"compressed-tensors"}),
        compressed_tensors.rules,
        compressed_tensors.candidates,
    ),
    Family(
        "bitsandbytes", frozenset({"bitsandbytes"}), bitsandbytes.rules, bitsandbytes.candidates
    ),
    Family("ModelOpt", modelopt.METHODS, modelopt.rules, modelopt.candidates),
    Family("fine-grained FP8", frozenset({"fp8"}), fp8.rules, fp8.candidates),
    Family("torchao", frozenset({"torchao"}), torchao.rules, torchao.candidates),
    Family("GGUF", frozenset({gguf.METHOD}), gguf.rules, gguf.candidates),
    Family("GPTQ", frozenset({"gptq"}), gptq.rules, gptq.candidates),
    Family("MLX", frozenset({mlx.METHOD}), mlx.rules, mlx.candidates),
    Family("Gemma", frozenset({"gemma"}), gemma.rules, gemma.candidates),
    Family("AutoRound", auto_round.METHODS, auto_round.rules, nothing_else),
    Family("AWQ", frozenset({"awq"}), awq.rules, awq.candidates),
)
