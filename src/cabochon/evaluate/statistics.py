"""Intervals and tests for shares of right answers; 0.967 against 0.970 means nothing without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959963984540054  # of 95 %


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, and the bounds between which it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def share(right: int, count: int) -> Interval:
    """The share of right answers, in Wilson's interval, which holds for few answers too.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    assert 0 <= right <= count
    assert count > 0
    p, spread = right / count, Z * Z / count
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / count + spread / (4 * count)) / (1 + spread)
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))


@dataclass(frozen=True, slots=True)
class Paired:
    """How two models differ on the same questions.

    Attributes:
        lost: questions that the first answers rightly and the second does not.
        gained: the other way round.
        difference: of the shares, second minus first.
        p: how probable so uneven a split is if neither is better: McNemar's exact test, two-sided.
    """

    lost: int
    gained: int
    difference: Interval
    p: float


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compare two models by their answers to the same questions, in the same order.

    Source of the interval: Agresti and Min 2005, who add half an answer to each cell.
    """
    assert len(first) == len(second) > 0
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    n, b, c = len(first) + 2, lost + 0.5, gained + 0.5
    centre = (c - b) / n
    half = Z * math.sqrt(b + c - (c - b) ** 2 / n) / n
    value = (gained - lost) / len(first)
    between = Interval(value, max(-1.0, centre - half), min(1.0, centre + half))
    return Paired(lost, gained, between, _mcnemar(lost, gained))


def _mcnemar(lost: int, gained: int) -> float:
    total, least = lost + gained, min(lost, gained)
    ways: int = sum(math.comb(total, k) for k in range(least + 1))
    return min(1.0, 2 * ways / (1 << total))


def mean(values: Sequence[float]) -> Interval:
    """The mean of independent values in a normal interval; of a single one there is none."""
    count = len(values)
    middle = math.fsum(values) / count
    if count == 1:
        return Interval(middle, -math.inf, math.inf)
    variance = math.fsum((value - middle) ** 2 for value in values) / (count - 1)
    half = Z * math.sqrt(variance / count)
    return Interval(middle, middle - half, middle + half)
