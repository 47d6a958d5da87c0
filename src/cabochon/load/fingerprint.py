"""A hash of a plan: equal where the same tensors, read the same way, make up the same model.

It covers the configuration, what each module is made of (scheme, dtypes, shapes, where in which
file) and what is done to activations. The values of weights are hashed where they are read, by the
certificate of a load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cabochon.checkpoint.headers import HEADER_ONLY, TensorMeta
from cabochon.load.plan import LoadPlan

SHORT = 16  # hexadecimal digits that people are shown


def plan_hash(plan: LoadPlan) -> str:
    """64 hexadecimal digits. The folder's own name and place have no part in it."""
    described = {
        "config": asdict(plan.config),
        "head": plan.has_head,
        "sites": [
            [read.site.name, read.part, read.stored_as, _tensors(read.stored)]
            for read in plan.sites
        ],
        "parameters": [[read.parameter.name, _tensor(read.tensor)] for read in plan.parameters],
    }
    text = json.dumps(described, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _tensors(stored: Mapping[str, TensorMeta]) -> dict[str, list[Any]]:
    return {leaf: _tensor(meta) for leaf, meta in stored.items()}


def _tensor(meta: TensorMeta) -> list[Any]:
    file = meta.file.name.removesuffix(HEADER_ONLY)
    return [meta.name, meta.dtype, meta.shape, file, meta.span]
