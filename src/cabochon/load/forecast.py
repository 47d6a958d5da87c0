"""What a plan will take of this machine: weights, keys and values, and the longest context left.

Told without torch; a test holds the figures equal to those of the cache that is then built.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cabochon.config import KeptLayers, TextConfig, kept_bytes, kept_layers
from cabochon.load.plan import LoadPlan

# Bytes of a number in the cache; float16 takes what bfloat16 does, int8 has scales beside it.
KV_DTYPES = {"bf16": 2, "f32": 4, "int8": 1}

# The program and what one step computes. Measured at its peak on E2B, with a picture: 0.77 GB.
PROGRAM = 800_000_000

_PAGE, _STEP = 16, 512  # tokens of a page of the cache, and of a step unless set otherwise
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # "max" where there is none


@dataclass(frozen=True, slots=True)
class Kept:
    """Keys and values that layers of one kind keep of all tokens, or of the last `window`."""

    kind: str
    layers: int
    window: int | None
    kv_heads: int
    head_dim: int
    elements_per_token: int

    @classmethod
    def of(cls, kept: KeptLayers) -> Kept:
        kind = "full" if kept.window is None else "sliding"
        sizes = (kept.window, kept.kv_heads, kept.head_dim, kept.elements)
        return cls(kind, len(kept.layers), *sizes)

    def as_dict(self) -> dict[str, Any]:
        """Bytes for each dtype keys and values may be kept in; `most` is None where it grows."""
        token = {
            name: kept_bytes(self.elements_per_token, self.head_dim, width)
            for name, width in KV_DTYPES.items()
        }
        most = {name: size * self.window for name, size in token.items()} if self.window else None
        return {**asdict(self), "bytes_per_token": token, "most_bytes_per_sequence": most}


@dataclass(frozen=True, slots=True)
class Forecast:
    """Memory, in bytes, on a machine that has `machine` of them."""

    machine: int
    weights: int  # as they lie in memory: matrices in their stored bits, the rest in float32
    text: TextConfig

    @classmethod
    def of(cls, plan: LoadPlan, machine: int) -> Forecast:
        rest = sum(read.tensor.nbytes for read in plan.parameters)
        widened = sum(
            read.tensor.nbytes * (2 if read.tensor.dtype != "F32" else 1)
            for read in plan.parameters
        )
        return cls(machine, plan.nbytes - rest + widened, plan.config.text)

    @property
    def free(self) -> int:
        """What is left for keys and values; below zero if the weights alone do not fit."""
        return self.machine - self.weights - PROGRAM

    def per_thousand(self, width: int) -> int:
        """Bytes by which keys and values grow with 1,000 tokens, behind all windows."""
        return 1000 * self._bytes(width, growing=True)

    def windows(self, width: int) -> int:
        """The most bytes that one sequence keeps in layers with a window."""
        return self._bytes(width, growing=False)

    def largest_context(self, width: int) -> int:
        """Tokens of the longest sequence that fits, with the page arithmetic of the cache."""
        page = _PAGE * self._bytes(width, growing=True)
        pages = (self.free - self.windows(width)) // max(page, 1)
        return max(0, min(self.text.max_positions, pages * _PAGE))

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine_bytes": self.machine,
            "weights_bytes": self.weights,
            "program_bytes": PROGRAM,
            "fits": self.largest_context(KV_DTYPES["f32"]) > 0,
            "kv_bytes_per_1000_tokens": {n: self.per_thousand(w) for n, w in KV_DTYPES.items()},
            "kv_window_bytes": {name: self.windows(width) for name, width in KV_DTYPES.items()},
            "largest_context": {n: self.largest_context(w) for n, w in KV_DTYPES.items()},
            "model_context": self.text.max_positions,
        }

    def _bytes(self, width: int, *, growing: bool) -> int:
        """A token's in layers without a window, or a sequence's in those with one."""
        kept = kept_layers(self.text)
        if growing:
            return sum(layers.token_bytes(width) for layers in kept if layers.window is None)
        return sum(
            layers.token_bytes(width) * self._window_tokens(layers.window)
            for layers in kept
            if layers.window is not None
        )

    def _window_tokens(self, window: int) -> int:
        """Behind a window are two cut pages; the tokens of a step come on top."""
        pages = -(-window // _PAGE) + 2 + -(-_STEP // _PAGE)
        return _PAGE * min(pages, -(-self.text.max_positions // _PAGE))


def machine_memory() -> int:
    """Bytes of memory that this process may count on: the machine's, or its container's."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = _CONTAINER_LIMIT.read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdecimal() else machine
