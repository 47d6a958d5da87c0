"""How far one tensor is from another that it should equal, added up tile by tile."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Distance:
    """Of `found` from `expected`.

    Attributes:
        relative: the norm of the difference, in norms of what was expected.
        cosine: of the angle between the two.
        largest: the largest single difference.
    """

    relative: float
    cosine: float
    largest: float

    @property
    def decibels(self) -> float:
        """Signal to noise; infinite where both are equal."""
        return -20 * math.log10(self.relative) if self.relative > 0 else math.inf


class Measure:
    """Sums, in float64, of which a `Distance` is made; no more than a tile is held."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64)  # expected², found², product, difference²
        self._largest = 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Two tensors of the same shape."""
        assert expected.shape == found.shape, (expected.shape, found.shape)
        if not expected.numel():
            return
        a, b = expected.flatten().double(), found.flatten().double()
        gap = a - b
        self._sums += torch.stack((a @ a, b @ b, a @ b, gap @ gap))
        self._largest = max(self._largest, float(gap.abs().max()))

    @property
    def distance(self) -> Distance:
        expected, found, product, gap = (float(value) for value in self._sums)
        if gap == 0:
            return Distance(0.0, 1.0, 0.0)
        relative = math.sqrt(gap / expected) if expected else math.inf
        both = math.sqrt(expected * found)
        cosine = product / both if both else 0.0
        return Distance(relative, min(cosine, 1.0), self._largest)


def total(measures: Iterable[Measure]) -> Distance:
    """Of everything that any of `measures` has seen."""
    whole = Measure()
    for measure in measures:
        whole._sums += measure._sums
        whole._largest = max(whole._largest, measure._largest)
    return whole.distance


def distance(expected: Tensor, found: Tensor) -> Distance:
    """Of two tensors; as far as can be where they have not even the same shape."""
    if expected.shape != found.shape:
        return Distance(math.inf, 0.0, math.inf)
    measure = Measure()
    measure.add(expected, found)
    return measure.distance
