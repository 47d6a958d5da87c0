"""What a load can prove: all slots filled, how the weights look, and hashes of plan and bytes.

Two replicas with the same fingerprint run the same bytes, read the same way.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cabochon.load.findings import Finding, findings
from cabochon.load.fingerprint import SHORT
from cabochon.load.kv_scales import CacheScale, told

MANY = 3  # are enough to say what is usual
FAR = 256  # times a median: no quantizer's scales spread so far, and a damaged exponent's bit does


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """A matrix as it was read. Entries are those seen, scales are all."""

    name: str
    scheme: str
    entries: int
    seen: int
    largest: float  # magnitude
    zeros: int
    scales: int
    dead_groups: int  # whose scale is zero
    largest_scale: float
    median_scale: float
    far_scales: bool  # the largest is beyond FAR medians
    # how large its scales, biases and fixed scales of activations are, by leaf, and by scheme where
    # parts are stored in several: medians
    levels: Mapping[str, float] = field(default_factory=dict)
    parts: int = 1  # stored one by one, such as experts
    # whose scales or entries are beyond FAR medians of the parts' in the same scheme, or zero as
    # those of others are not
    far_parts: int = 0
    shifted_zeros: bool = False  # its zero points are all the same, one beside the middle code
    unclaimed_zeros: bool = False  # they are not all the middle, and symmetric codes are claimed
    offset: float = 0.0  # how far codes are from their zero points on average, in steps

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Certificate:
    """Of one load. There is none of a load that met a value that is no number: that is refused."""

    plan_hash: str
    weights_hash: str  # of all bytes that were read, under their names
    planned: int  # matrices and parameters
    filled: int
    nbytes: int
    sites: tuple[SiteStatistics, ...] = field(repr=False)
    kv_scales: tuple[CacheScale, ...] = ()  # of a cache that is not quantized here
    untrained: tuple[str, ...] = ()  # parameters that change nothing, as before training

    @property
    def fingerprint(self) -> str:
        """Half of it names the plan, as `inspect` does, the other half the bytes."""
        return f"{self.plan_hash[:SHORT]}-{self.weights_hash[:SHORT]}"

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What is legal and looks like damage."""
        lost = (("", name, 1, _UNTRAINED) for name in self.untrained)
        return findings([*_oddities(self.sites), *lost])

    def as_dict(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "plan_hash": self.plan_hash,
            "weights_hash": self.weights_hash,
            "slots_planned": self.planned,
            "slots_filled": self.filled,
            "bytes": self.nbytes,
            "sites": [site.as_dict() for site in self.sites],
            "kv_scales": [scale.as_dict() for scale in self.kv_scales],
            "notes": [note.as_dict() for note in self.notes],
        }

    def text(self) -> str:
        """For a terminal: sums, and what looks odd."""
        seen, entries = (sum(getattr(s, n) for s in self.sites) for n in ("seen", "entries"))
        zeros = sum(site.zeros for site in self.sites)
        largest = max(self.sites, key=lambda site: site.largest)
        lines = [
            f"loaded {self.filled} of {self.planned} planned matrices and parameters,"
            f" fingerprint {self.fingerprint}",
            f"  largest entry {largest.largest:.4g} in {largest.name};"
            f" {zeros / max(seen, 1):.2%} zeros; {seen:,} of {entries:,} entries looked at",
            f"  {sum(s.scales for s in self.sites):,} scales,"
            f" {sum(s.dead_groups for s in self.sites):,} of them zero",
            *told(self.kv_scales),
        ]
        return "\n".join([*lines, *(line for note in self.notes for line in note.lines())])


_AS_IF = "as if they were read by the convention of another version of GPTQ's format"
_SHIFTED = f"all zero points lie one beside the middle of the codes, {_AS_IF}"
_UNCLAIMED = (
    "zero points are not all the middle of the codes, although config.json says sym: true,"
    f" {_AS_IF}"
)
_OFFSET = f"here and elsewhere, entries lie about one step beside zero on average, {_AS_IF}"
_UNTRAINED = (
    "as it was before training, so that pictures are not standardized: a quantizer may have lost"
    " it, as AutoRound 0.16.1 does in some recipes for experts"
)
_BESIDE = 0.5  # steps: half of what versions are apart


def _oddities(sites: Sequence[SiteStatistics]) -> Iterator[tuple[str, str, int, str]]:
    for site in sites:
        if site.dead_groups:
            share = f"{site.dead_groups} of {site.scales} scales are zero"
            yield "", site.name, 1, f"{share}: what they stand for is lost, or was never used"
        if site.far_scales:
            times = site.largest_scale / site.median_scale
            yield "", site.name, 1, f"the largest scale is {times:.0f} times the median of them"
        if site.unclaimed_zeros:
            yield "", site.name, 1, _UNCLAIMED
        elif site.shifted_zeros:
            yield "", site.name, 1, _SHIFTED
        if site.far_parts:
            parts = f"{site.far_parts} of its {site.parts} parts"
            yield "", site.name, 1, f"{parts} have scales or entries far from those of the others"
        if site.largest and 0 in (v for leaf, v in site.levels.items() if _is(leaf, "biases")):
            yield "", site.name, 1, "all biases are zero, so that all entries have one sign"
        if site.seen and not site.largest:
            yield "", site.name, 1, "every entry that was looked at is zero"
    yield from _beside_zero(sites)
    yield from _strangers(sites)


def _beside_zero(sites: Sequence[SiteStatistics]) -> Iterator[tuple[str, str, int, str]]:
    """Weights lie about zero. One matrix's may not; those of most matrices do, and all together.

    Versions of GPTQ's format are one step apart, whatever its size. That is much of what entries of
    4 bits are apart, and little of 8; but the more entries are averaged, the less they stray.
    """
    coded = [site for site in sites if site.offset]
    if len(coded) < MANY:
        return
    usual = statistics.median(site.offset for site in coded)
    mean = statistics.fmean((s.offset for s in coded), weights=[s.seen for s in coded])
    if min(usual, mean) >= _BESIDE or max(usual, mean) <= -_BESIDE:
        for site in coded:
            if not site.unclaimed_zeros | site.shifted_zeros:
                yield "", site.name, 1, _OFFSET


def _strangers(sites: Sequence[SiteStatistics]) -> Iterator[tuple[str, str, int, str]]:
    """Matrices that are far from the same matrix in other layers; of tables, from all matrices.

    Only of tables: some converters move a factor of all layers' matrices into another tensor.
    """
    alike: dict[str, list[SiteStatistics]] = {}
    for site in sites:
        alike.setdefault(_layerless(site.name), []).append(site)
    everywhere = _usual([site.largest for site in sites])
    for group in alike.values():
        entry = _usual([site.largest for site in group])
        for site in group:
            found = list(_levels(site, group, sites))
            yield from (("", site.name, 1, text) for text in found)
            usual = entry if len(group) > 1 else everywhere
            if not found and _far(site.largest, usual):
                times = f"{site.largest / usual:.3g} times"
                yield "", site.name, 1, f"its largest entry is {times} what others have"


def _levels(
    site: SiteStatistics, group: Sequence[SiteStatistics], sites: Sequence[SiteStatistics]
) -> Iterator[str]:
    """What is said of the numbers that go with `site`, beside those of the others in `group`.

    Without any there that have the same, beside all that are stored as it is: these only tell how
    large numbers are. An LM head whose activations are not rounded has zeros as nothing else does.
    """
    alike = [other for other in group if other.levels.keys() == site.levels.keys()]
    alone = len(alike) < 2
    peers = [other for other in sites if other.scheme == site.scheme] if alone else alike
    for leaf, level in site.levels.items():
        others = [
            other.levels[leaf] for other in peers if other is not site if leaf in other.levels
        ]
        alive = [value for value in others if value]
        usual = statistics.median(alive) if alive else 0.0
        if _far(level, usual):
            yield f"its {leaf} is {level / usual:.3g} times that of the same matrix elsewhere"
        elif not level and usual and len(alive) == len(others) and not alone:
            yield f"its {leaf} is zero, and that of no other like it"


def _usual(values: Sequence[float]) -> float:
    """Their median; 0 of too few to tell."""
    alive = [value for value in values if value]
    return statistics.median(alive) if len(alive) >= MANY else 0.0


def _far(value: float, usual: float) -> bool:
    return usual > 0 and value > 0 and not 1 / FAR < value / usual < FAR


def _is(level: str, leaf: str) -> bool:
    """Whether a level is that of `leaf`, in whatever scheme."""
    return level.partition(" ")[0] == leaf


def _layerless(name: str) -> str:
    return ".".join("N" if part.isdecimal() else part for part in name.split("."))


def join(parts: Mapping[str, Sequence[SiteStatistics]]) -> Iterator[SiteStatistics]:
    """One for each matrix: those of its parts, such as experts, put together."""
    for name, found in parts.items():
        kinds: dict[str, list[SiteStatistics]] = {}
        for part in found:
            kinds.setdefault(part.scheme, []).append(part)
        entry = _usual([part.largest for part in found])
        yield SiteStatistics(
            name=name,
            scheme=" and ".join(sorted(kinds)),
            entries=sum(part.entries for part in found),
            seen=sum(part.seen for part in found),
            largest=max(part.largest for part in found),
            zeros=sum(part.zeros for part in found),
            scales=sum(part.scales for part in found),
            dead_groups=sum(part.dead_groups for part in found),
            largest_scale=max(part.largest_scale for part in found),
            median_scale=statistics.median(part.median_scale for part in found),
            far_scales=any(part.far_scales for part in found),
            levels=dict(_joined_levels(kinds)),
            parts=len(found),
            shifted_zeros=all(part.shifted_zeros for part in found),
            unclaimed_zeros=any(part.unclaimed_zeros for part in found),
            offset=statistics.fmean(part.offset for part in found),
            far_parts=sum(_far_parts(alike, entry) for alike in kinds.values()),
        )


def _joined_levels(
    kinds: Mapping[str, Sequence[SiteStatistics]],
) -> Iterator[tuple[str, float]]:
    for scheme, found in kinds.items():
        for leaf in found[0].levels:
            name = leaf if len(kinds) == 1 else f"{leaf} ({scheme})"
            yield name, statistics.median(part.levels[leaf] for part in found)


def _far_parts(found: Sequence[SiteStatistics], entry: float) -> int:
    """How many of these parts, all in the same scheme, stand out; `entry` is usual in all parts."""
    scale = _usual([part.median_scale for part in found])
    alive = {leaf for leaf in found[0].levels if any(part.levels[leaf] for part in found)}
    return sum(
        _far(part.median_scale, scale)
        or _far(part.largest, entry)
        or not all(part.levels[leaf] for leaf in alive)
        for part in found
    )
