"""Which modules and matrices lost more than rounding explains.

What is normal is learnt from the checkpoint itself: the same matrix in other layers, stored alike,
and the original's own spread. Only where there is nothing to compare with, or everything is wrong
alike, does the number of bits decide.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from cabochon.verify.together import ModuleError
from cabochon.verify.weights import SiteSigns

TIMES = 3.0  # the median of its kind: rounding of alike matrices differs by a few percent
FEW = 4  # of a kind are too few to learn from
SPREADS = 32.0  # what the original differs from itself, so many times, is no rounding of weights
ALONG_ONE = 2.0  # times what noise has along one direction

# By bits: of three bits of mantissa, and of seven.
_FLOATS = {8: 2.0**-3, 16: 2.0**-7}

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Suspect:
    """A module or matrix that needs explaining; `weight` sorts the worst first."""

    name: str
    reason: str
    weight: float


def suspicious_weights(sites: Sequence[SiteSigns], bits: Mapping[str, int]) -> list[Suspect]:
    """Matrices that lost more than those like them, or in a way that rounding does not."""
    found = {s.name: s.loss.distance.relative for s in sites if s.loss is not None}
    alike = {site.name: site.stored_as for site in sites}
    made = list(_unlike(found, alike, bits, floor=0.0))
    for site in sites:
        if site.loss is not None:
            made += _parts(site, site.loss.parts)
            if site.loss.concentration > ALONG_ONE and site.loss.distance.relative > 1e-6:
                reason = (
                    f"its error goes along one direction, {site.loss.concentration:.1f} times as"
                    " much as rounding does: something was added"
                )
                made.append(Suspect(site.name, reason, site.loss.distance.relative))
    return _worst_first(made)


def suspicious_modules(
    runs: Sequence[Sequence[ModuleError]], stored: Mapping[str, str], bits: Mapping[str, int]
) -> list[Suspect]:
    """Modules that depart further from the original than those like them, given its inputs.

    So does one whose inputs depart although nothing that ran before it does. Each of `runs` is of
    one prompt, in the order of execution.
    """
    found: dict[str, float] = {}
    spread = 0.0
    for error in (error for run in runs for error in run):
        spread = max(spread, error.spread)
        if error.added is not None:
            found[error.name] = max(found.get(error.name, 0.0), error.added.relative)
    alike = {name: stored.get(name, "") for name in found}
    floor = SPREADS * max(spread, torch.finfo(torch.float32).eps)
    misled = {s.name: s for run in runs if (s := _misled(run, floor)) is not None}
    return _worst_first([*_unlike(found, alike, bits, floor=floor), *misled.values()])


def _misled(run: Sequence[ModuleError], floor: float) -> Suspect | None:
    """The first module to depart, if it does so only for what it was given."""
    first = next((error for error in run if error.reached.relative > floor), None)
    if first is None or first.added is None or first.added.relative > floor:
        return None
    reason = "what goes into it departs, although no module before it does"
    return Suspect(first.name, reason, first.reached.relative)


def _unlike(
    found: Mapping[str, float], alike: Mapping[str, str], bits: Mapping[str, int], *, floor: float
) -> Iterator[Suspect]:
    kinds: dict[tuple[str, str], list[float]] = {}
    stored: dict[str, list[float]] = {}
    for name, error in found.items():
        kinds.setdefault((_NUMBER.sub("*", name), alike[name]), []).append(error)
        stored.setdefault(alike[name], []).append(error)
    for name, error in found.items():
        kind = kinds[_NUMBER.sub("*", name), alike[name]]
        group = kind if len(kind) >= FEW else stored[alike[name]]
        usual = statistics.median(group)
        if error > max(TIMES * usual, floor):
            usually = f"where {usual:.2g} is usual" if usual else "where the others lose nothing"
            yield Suspect(name, f"it loses {error:.2g} of its size, {usually}", error)
        elif error > _most(bits.get(name)):
            reason = f"it loses {error:.2g} of its size, more than {bits.get(name)} bits explain"
            yield Suspect(name, reason, error)


def _most(bits: int | None) -> float:
    """What rounding to `bits` explains.

    Steps of integers are `2 ** (1 - bits)` of the largest entry of a group, which is a few usual
    ones. Those of floats are shares of each entry, and a recipe may round inputs alike.
    """
    if bits is None:
        return 1.2
    return min(1.2, max(4 * 2.0 ** (1 - bits), _FLOATS.get(bits, 0.0)))


def _parts(site: SiteSigns, parts: Sequence[float]) -> Iterator[Suspect]:
    usual = statistics.median(parts) if parts else 0.0
    far = [index for index, error in enumerate(parts) if error > max(TIMES * usual, 1e-6)]
    if far and len(far) < len(parts) / 2:
        numbers = ", ".join(map(str, far[:8]))
        reason = f"parts {numbers} of {len(parts)} lose far more than the others ({usual:.2g})"
        yield Suspect(site.name, reason, max(parts))


def _worst_first(suspects: Iterable[Suspect]) -> list[Suspect]:
    return sorted(suspects, key=lambda suspect: -suspect.weight)
