"""Scales of a quantized KV cache: read, looked at and told, and computed with nowhere.

Keys and values are kept in the compute dtype, which needs none. One that is no number still shows a
file that is damaged, or a quantizer that failed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cabochon.load.plan import LoadPlan


@dataclass(frozen=True, slots=True)
class CacheScale:
    """One stored tensor, mostly a single number: the scale of one layer's keys or values."""

    name: str
    least: float
    largest: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_kv_scales(plan: LoadPlan) -> tuple[CacheScale, ...]:
    """Those of `plan`, in the order of the file.

    Raises:
        UnreadableError: a file ended early.
        LoadError: one is not finite; the text names the tensor.
    """
    import torch

    from cabochon.checkpoint.folder import read_tensor
    from cabochon.load.values import check_finite

    found = []
    for meta in plan.kv_scales:
        values = read_tensor(meta).float()
        check_finite(values, meta, torch.float32)
        if values.numel():
            found.append(CacheScale(meta.name, float(values.min()), float(values.max())))
    return tuple(found)


def told(scales: Sequence[CacheScale]) -> Iterator[str]:
    """A line for a terminal on each kind, over all layers."""
    kinds: dict[str, list[CacheScale]] = {}
    for scale in scales:
        kinds.setdefault(scale.name.rpartition(".")[2], []).append(scale)
    for leaf, of in kinds.items():
        least, largest = min(s.least for s in of), max(s.largest for s in of)
        yield f"  {len(of)} {leaf} of a quantized KV cache, {least:.4g} to {largest:.4g}: not used"
