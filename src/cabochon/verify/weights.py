"""Weights alone: what a file shows of itself, and what it lost against another, site by site.

No model is run and one matrix of each file is in memory at a time, decoded tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cabochon.errors import UnreadableError
from cabochon.load.in_file import opened
from cabochon.load.matrices import Matrix, matrices
from cabochon.load.plan import LoadPlan
from cabochon.load.tree import HEAD, TEXT
from cabochon.nn.weight import TILE_BYTES, Weight
from cabochon.verify.distance import Distance, Measure, total
from cabochon.verify.stage import Progress

GROUP = 32  # columns that are looked at together; recipes have groups of 16 to 128
OUTLIER = 8.0  # times the median error, from which on a group is one
SKETCH = 16
TOKENS = f"{TEXT}.embed_tokens"


@dataclass(frozen=True, slots=True)
class Signs:
    """What a matrix shows without a second one to compare it with.

    Attributes:
        largest: the largest magnitude.
        zeros: share of entries that are zero.
        dead: groups of which every entry is zero.
        edge: share of entries that share the largest magnitude of their group with another: codes
            at the end of their range. Floats have hardly any; clipping shows here.
    """

    entries: int
    nbytes: int
    largest: float
    zeros: float
    dead: int
    edge: float

    @property
    def bits(self) -> float:
        """Stored bits for each entry, scales included."""
        return 8 * self.nbytes / self.entries


@dataclass(frozen=True, slots=True)
class Loss:
    """What a matrix lost against the one it was made from.

    Attributes:
        outliers: groups whose error is `OUTLIER` times the matrix' median.
        groups: how many there are.
        parts: the relative error of each part, such as an expert, of a matrix that has some.
        concentration: how much of the difference goes along one direction of the input, in times
            what it is of noise. Rounding goes in all directions, what was trained in few.
    """

    distance: Distance
    outliers: int
    groups: int
    parts: tuple[float, ...]
    concentration: float


@dataclass(frozen=True, slots=True)
class SiteSigns:
    """One site of a file, and, where there is a second file, what it lost."""

    name: str
    stored_as: str
    signs: Signs
    original: str | None = None  # how the other file stores it
    loss: Loss | None = None


def examine(plan: LoadPlan, progress: Progress | None = None) -> Iterator[SiteSigns]:
    """The signs of every matrix of `plan`, which has no problems, in the order of its files."""
    done = 0
    for matrix in matrices(plan):
        yield SiteSigns(matrix.name, matrix.stored_as, _signs(matrix, opened(matrix)))
        done += matrix.nbytes
        if progress is not None:
            progress(done, plan.nbytes)


def compare(
    original: LoadPlan, plan: LoadPlan, progress: Progress | None = None
) -> Iterator[SiteSigns]:
    """The same for `plan`, and what each matrix lost against the one of `original`.

    A head that the original does not store is compared with its token table. Any other matrix that
    only one of them has, has no loss.

    Raises:
        UnreadableError: a matrix has another size in `original`.
    """
    done = 0
    expected = {matrix.name: matrix for matrix in matrices(original)}
    expected.setdefault(HEAD, expected[TOKENS])
    for matrix in matrices(plan):
        if matrix.name in expected:
            _check_size(matrix, expected[matrix.name])
    for matrix in matrices(plan):
        other = expected.get(matrix.name)
        weight = opened(matrix)
        loss = None if other is None else _loss(opened(other), weight, matrix.parts)
        stored = None if other is None else other.stored_as
        yield SiteSigns(matrix.name, matrix.stored_as, _signs(matrix, weight), stored, loss)
        done += matrix.nbytes
        if progress is not None:
            progress(done, plan.nbytes)


def _check_size(matrix: Matrix, other: Matrix) -> None:
    found, expected = ("x".join(map(str, m.size)) for m in (matrix, other))
    if found != expected:
        raise UnreadableError(
            f"{matrix.name} is {found}, and {expected} in the other checkpoint: only models of the"
            " same sizes can be compared"
        )


def _signs(matrix: Matrix, weight: Weight) -> Signs:
    largest, zeros, dead, edge = 0.0, 0, 0, 0
    for start, stop in _tiles(weight):
        rows = weight.dense(torch.float32, start, stop).abs()
        groups = _groups(rows)
        top = groups.amax(dim=-1, keepdim=True)
        at_top = (groups == top).sum(dim=-1)[top[..., 0] > 0]
        largest = max(largest, float(top.max()))
        zeros += int((rows == 0).sum())
        dead += int((top == 0).sum())
        edge += int(at_top[at_top > 1].sum())
    entries = weight.out_features * weight.in_features
    return Signs(entries, matrix.nbytes, largest, zeros / entries, dead, edge / entries)


def _loss(expected: Weight, found: Weight, count: int) -> Loss:
    rows = found.out_features // count
    parts = [Measure() for _ in range(count)]
    errors = torch.empty(found.out_features, -(-found.in_features // GROUP))
    directions = torch.randn(
        found.in_features, SKETCH, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    sketch = torch.zeros(SKETCH, SKETCH)
    for part, start, stop in _tiles_of_parts(found, rows):
        a = expected.dense(torch.float32, start, stop)
        b = found.dense(torch.float32, start, stop)
        parts[part].add(a, b)
        gap = a - b
        errors[start:stop] = _groups(gap).square().mean(dim=-1)
        seen = gap @ directions
        sketch += seen.T @ seen
    mean = errors.flatten().sqrt_()
    outliers = int((mean > OUTLIER * mean.median()).sum()) if mean.any() else 0
    return Loss(
        total(parts),
        outliers,
        len(mean),
        tuple(part.distance.relative for part in parts) if count > 1 else (),
        _concentration(sketch, found.out_features, found.in_features),
    )


def _concentration(sketch: Tensor, rows: int, columns: int) -> float:
    """The largest eigenvalue's share of the trace, by what it is of noise of this shape.

    Source: Marchenko and Pastur 1967 on the eigenvalues of `[rows, SKETCH]` of noise; the sketch
    itself is of `[columns, SKETCH]` random numbers.
    """
    trace = float(sketch.trace())
    edge = (1 + math.sqrt(SKETCH / rows) + math.sqrt(SKETCH / columns)) ** 2 / SKETCH
    return float(torch.linalg.eigvalsh(sketch)[-1]) / trace / edge if trace else 0.0


def _tiles_of_parts(weight: Weight, rows: int) -> Iterator[tuple[int, int, int]]:
    """Tiles that lie inside one of the parts of `rows` each: the part, and where it begins."""
    step = min(rows, max(1, TILE_BYTES // (4 * weight.in_features)))
    for part in range(weight.out_features // rows):
        for start in range(part * rows, (part + 1) * rows, step):
            yield part, start, min(start + step, (part + 1) * rows)


def _tiles(weight: Weight) -> Iterator[tuple[int, int]]:
    step = max(1, TILE_BYTES // (4 * weight.in_features))
    for start in range(0, weight.out_features, step):
        yield start, min(start + step, weight.out_features)


def _groups(rows: Tensor) -> Tensor:
    """`[rows, in]` as `[rows, groups, GROUP]`; the last group of a row is filled up with zeros."""
    missing = -rows.shape[1] % GROUP
    return F.pad(rows, (0, missing)).view(len(rows), -1, GROUP)
