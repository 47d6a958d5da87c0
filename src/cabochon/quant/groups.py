"""Sizes of groups that share a scale, from how many of them there are."""

from __future__ import annotations

from cabochon.checkpoint.headers import TensorMeta


def sizes(in_features: int, count: int) -> list[int | None]:
    """Group sizes that give `count` groups: powers of two, and an even split. None: one group."""
    if count <= 1:
        return [None]
    found = {2**n for n in range(3, 13) if -(-in_features // 2**n) == count}
    if in_features % count == 0:
        found.add(in_features // count)
    return sorted(found) or [None]


def count(scales: TensorMeta | None, axis: int) -> int:
    """How many groups `scales` has along `axis`."""
    return scales.shape[axis] if scales is not None and scales.shape else 1
