"""`cabochon compare`: what weights show and what they lost, for terminals, machines and pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cabochon import __version__
from cabochon.load.groups import group_of
from cabochon.load.plan import LoadPlan
from cabochon.load.report import plan_checkpoint
from cabochon.verify.chart import scatter
from cabochon.verify.page import Page
from cabochon.verify.stage import Progress
from cabochon.verify.weights import SiteSigns, compare, examine

MOST = 10  # sites of a list that a terminal gets to see
EDGE = 0.2  # share of codes at the end of their range that no recipe means; int4 has about 0.05
SCHEMA = 1  # of the JSON


@dataclass(frozen=True, slots=True)
class Comparison:
    """One file's matrices, and what they lost against `original`, if there is one."""

    path: Path
    original: Path | None
    sites: tuple[SiteSigns, ...]

    @property
    def worst(self) -> tuple[SiteSigns, ...]:
        """Those that lost something, the worst first."""
        lossy = [site for site in self.sites if _decibels(site) < math.inf]
        return tuple(sorted(lossy, key=_decibels))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What deserves a look, whatever the recipe."""
        return tuple(text for site in self.sites for text in _remarks(site))

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "checkpoint": str(self.path),
            "original": None if self.original is None else str(self.original),
            "remarks": list(self.remarks),
            "sites": [_as_dict(site) for site in self.sites],
        }

    def text(self) -> str:
        against = "" if self.original is None else f" against {self.original}"
        lines = [f"{self.path}{against}: {len(self.sites)} matrices", "", *_table(self.rows)]
        if self.worst:
            lines += ["", "the worst, by signal to noise"]
            lines += [
                f"  {_decibels(site):6.1f} dB  {site.name}  {site.stored_as}"
                for site in self.worst[:MOST]
            ]
        if self.remarks:
            lines += ["", "remarks", *(f"  {text}" for text in self.remarks[:MOST])]
            if len(self.remarks) > MOST:
                lines.append(f"  and {len(self.remarks) - MOST} more, in --json and --html")
        return "\n".join(lines)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Groups of matrices that are stored alike: name, scheme, count, bits, and loss."""
        groups: dict[tuple[str, str], list[SiteSigns]] = {}
        for site in self.sites:
            groups.setdefault((group_of(site.name), site.stored_as), []).append(site)
        return [_row(group, stored, sites) for (group, stored), sites in groups.items()]

    def page(self, command: str) -> str:
        """One HTML page; `command` makes it again."""
        page = Page(f"Weights of {self.path.name}")
        facts = {"checkpoint": str(self.path), "matrices": str(len(self.sites))}
        if self.original is not None:
            facts["against"] = str(self.original)
        page.facts(facts | {"cabochon": __version__})
        page.code(command)
        page.heading("By kind")
        page.table("", COLUMNS, self.rows)
        if self.worst:
            page.heading("Loss along depth")
            caption = "Signal to noise of each matrix against the original; higher is closer."
            page.figure(scatter(self._along_depth(), "layer", "dB"), caption)
            page.heading("The worst matrices")
            page.table("", WORST_COLUMNS, [_worst(site) for site in self.worst[:MOST]])
        page.heading("Remarks")
        for text in self.remarks or ("None: no dead groups, no codes crowded at their ends.",):
            page.paragraph(text)
        return page.text()

    def _along_depth(self) -> Mapping[str, list[tuple[float, float, str]]]:
        series: dict[str, list[tuple[float, float, str]]] = {}
        for site in self.worst:
            layer = next((int(part) for part in site.name.split(".") if part.isdecimal()), None)
            if layer is not None:
                points = series.setdefault(group_of(site.name), [])
                points.append((layer, _decibels(site), f"{site.name}, {_decibels(site):.1f} dB"))
        return series


LOSS = ("dB least", "dB mean", "largest error", "outlying")
COLUMNS = ("group", "stored as", "matrices", "MB", "bits", *LOSS, "dead", "at the ends")
WORST_COLUMNS = ("matrix", "stored as", "dB", "largest error", "outlying groups")


def compare_checkpoints(
    path: Path, original: Path | None = None, progress: Progress | None = None
) -> Comparison:
    """Look at the weights of `path`, and at what they lost against `original`.

    Raises:
        UnreadableError, LoadError: one of them is no checkpoint that loads.
    """
    plan = _plan(path)
    found = (
        examine(plan, progress) if original is None else compare(_plan(original), plan, progress)
    )
    return Comparison(path, original, tuple(found))


def _plan(path: Path) -> LoadPlan:
    plan = plan_checkpoint(path).plan
    assert plan is not None
    return plan


def _decibels(site: SiteSigns) -> float:
    return math.inf if site.loss is None else site.loss.distance.decibels


def _remarks(site: SiteSigns) -> Iterator[str]:
    signs = site.signs
    if signs.dead:
        yield f"{site.name}: {signs.dead} groups hold nothing but zeros"
    if signs.edge > EDGE:
        yield f"{site.name}: {signs.edge:.0%} of its codes are at the ends of their range"
    if site.loss is not None and site.loss.outliers > site.loss.groups // 100:
        yield (
            f"{site.name}: {site.loss.outliers} of {site.loss.groups} groups lost far more than the"
            " others"
        )


def _as_dict(site: SiteSigns) -> dict[str, Any]:
    decibels = _decibels(site)
    loss = None
    if site.loss is not None:
        loss = {
            **asdict(site.loss.distance),
            "decibels": decibels if math.isfinite(decibels) else None,
            "outliers": site.loss.outliers,
            "groups": site.loss.groups,
        }
    signs = {**asdict(site.signs), "bits": site.signs.bits}
    return {
        "name": site.name,
        "stored_as": site.stored_as,
        "original": site.original,
        **signs,
        "loss": loss,
    }


def _row(group: str, stored: str, sites: Sequence[SiteSigns]) -> tuple[str, ...]:
    entries = sum(site.signs.entries for site in sites)
    nbytes = sum(site.signs.nbytes for site in sites)
    edge = sum(site.signs.edge * site.signs.entries for site in sites) / entries
    dead = sum(site.signs.dead for site in sites)
    return (
        group,
        stored,
        str(len(sites)),
        f"{nbytes / 1e6:.2f}",
        f"{8 * nbytes / entries:.2f}",
        *_lost(sites),
        str(dead),
        f"{edge:.1%}",
    )


def _lost(sites: Sequence[SiteSigns]) -> tuple[str, ...]:
    """What alike matrices lost together, under the words of `LOSS`."""
    losses = [site.loss for site in sites if site.loss is not None]
    lossy = [loss.distance.decibels for loss in losses if loss.distance.relative > 0]
    if not lossy:
        return ("equal",) * 2 + ("", "") if losses else ("",) * 4
    largest = max(loss.distance.largest for loss in losses)
    outliers = sum(loss.outliers for loss in losses)
    groups = sum(loss.groups for loss in losses)
    return (
        f"{min(lossy):.1f}",
        f"{sum(lossy) / len(lossy):.1f}",
        f"{largest:.3g}",
        f"{outliers} of {groups}",
    )


def _worst(site: SiteSigns) -> tuple[str, ...]:
    assert site.loss is not None
    loss = site.loss
    return (
        site.name,
        site.stored_as,
        f"{_decibels(site):.1f}",
        f"{loss.distance.largest:.3g}",
        f"{loss.outliers} of {loss.groups}",
    )


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    lines = [COLUMNS, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        names = (cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True))
        numbers = (cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True))
        yield "  " + "  ".join((*names, *numbers)).rstrip()
