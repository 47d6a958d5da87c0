"""A plan in numbers: which groups of modules are stored how, and what stays in high precision."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cabochon.checkpoint.headers import BITS
from cabochon.load.findings import collapse
from cabochon.load.plan import LoadPlan
from cabochon.load.tree import (
    AUDIO,
    AUDIO_PROJECTOR,
    EMBEDDER,
    HEAD,
    TEXT,
    VISION,
    VISION_PROJECTOR,
)
from cabochon.quant.scheme import Dense

_PARAMETERS = "norms and scalars"
_CLUSTERS = "clusters of tokens"

# First match of a site's canonical name.
_GROUPS = (
    (re.compile(rf"{re.escape(TEXT)}\.layers\.\d+\.self_attn\..+"), "attention"),
    (re.compile(rf"{re.escape(TEXT)}\.layers\.\d+\.mlp\..+"), "mlp"),
    (re.compile(rf"{re.escape(TEXT)}\.layers\.\d+\.router\..+"), "router"),
    (re.compile(rf"{re.escape(TEXT)}\.layers\.\d+\.experts\..+"), "experts"),
    (re.compile(rf"{re.escape(TEXT)}\.(layers\.\d+\.)?per_layer_.+"), "per-layer inputs"),
    (re.compile(rf"{re.escape(TEXT)}\.embed_tokens_per_layer"), "per-layer embeddings"),
    (re.compile(rf"{re.escape(TEXT)}\.embed_tokens"), "embeddings"),
    (re.compile(rf"{re.escape(HEAD)}"), "head"),
    (re.compile(rf"{re.escape(VISION)}\..+"), "vision tower"),
    (re.compile(rf"{re.escape(EMBEDDER)}\..+"), "vision embedder"),
    (re.compile(rf"{re.escape(VISION_PROJECTOR)}"), "vision projector"),
    (re.compile(rf"{re.escape(AUDIO)}\..+"), "audio tower"),
    (re.compile(rf"{re.escape(AUDIO_PROJECTOR)}"), "audio projector"),
    (re.compile(r"(pre|post)_projection"), "drafter's projections"),
    (re.compile(r"masked_embedding\..+"), _CLUSTERS),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Matrices or parameters of one group that are stored alike."""

    group: str
    scheme: str
    bits: int
    count: int
    parameters: int
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """With the bits that an entry takes in all: scales and zero points are not free."""
        each = round(8 * self.bytes / self.parameters, 3) if self.parameters else 0
        return {**asdict(self), "bits_per_weight": each}


@dataclass(frozen=True, slots=True)
class HighPrecision:
    """Matrices of one group that a quantized checkpoint keeps as floats."""

    group: str
    scheme: str
    count: int
    whole: bool  # nothing of the group is quantized
    where: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "where": list(self.where)}


def rows_of(plan: LoadPlan) -> tuple[Row, ...]:
    """What would be read, in the order in which the model holds it."""
    sums: dict[tuple[str, str, int], list[int]] = {}
    for group, scheme, bits, parameters, nbytes in _stored(plan):
        total = sums.setdefault((group, scheme, bits), [0, 0, 0])
        for i, amount in enumerate((1, parameters, nbytes)):
            total[i] += amount
    return tuple(Row(*key, *total) for key, total in sums.items())


def high_precision(plan: LoadPlan) -> tuple[HighPrecision, ...]:
    """What is stored as floats although other matrices are not; empty if nothing is quantized."""
    quantized = {
        group_of(read.site.name) for read in plan.sites if not isinstance(read.scheme, Dense)
    }
    kept: dict[tuple[str, str], list[str]] = {}
    for read in plan.sites if quantized else ():
        if isinstance(read.scheme, Dense):
            key = (group_of(read.site.name), read.scheme.name)
            kept.setdefault(key, []).append(read.site.name)
    return tuple(
        HighPrecision(group, scheme, len(names), group not in quantized, collapse(names))
        for (group, scheme), names in kept.items()
    )


def group_of(name: str) -> str:
    """The group that the site of this canonical name belongs to."""
    return next(group for pattern, group in _GROUPS if pattern.fullmatch(name))


def _stored(plan: LoadPlan) -> Iterator[tuple[str, str, int, int, int]]:
    for read in plan.sites:
        site = read.site
        entries = site.out_features * site.in_features
        yield group_of(site.name), read.stored_as, read.scheme.bits, entries, read.nbytes
    for parameter in plan.parameters:
        tensor = parameter.tensor
        group = _CLUSTERS if parameter.parameter.order else _PARAMETERS
        entries = math.prod(tensor.shape)
        yield group, tensor.dtype.lower(), BITS[tensor.dtype], entries, tensor.nbytes
