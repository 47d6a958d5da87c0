"""A verification as text for terminals and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from cabochon import __version__
from cabochon.load.printed import describe
from cabochon.verify.page import Cell, Page, picture, verdict
from cabochon.verify.probes import QUESTION, TEXT, rectangle
from cabochon.verify.stage import Stage, Table
from cabochon.verify.verification import Verification

MOST = 10  # faults of a stage that a terminal gets to see

_SIGNS = {"passed": "ok  ", "failed": "FAIL", "not run": "--  "}


def text(found: Verification) -> str:
    """The verdict, then the stages."""
    against = "" if found.against is None else f" against {found.against}"
    word = "verified" if found.passed else "not verified"
    lines = [f"{found.path}{against}: {word}", ""]
    for stage in found.stages:
        lines += _stage(stage)
    return "\n".join(lines)


def _stage(stage: Stage) -> Iterator[str]:
    sign, finding = _SIGNS[stage.verdict], stage.finding
    yield f"{sign}  {stage.name}: {finding.summary} ({stage.seconds:.1f} s)"
    for fault in finding.faults[:MOST]:
        yield f"      {fault}"
    if len(finding.faults) > MOST:
        yield f"      and {len(finding.faults) - MOST} more"
    for fact in finding.facts[:MOST]:
        yield f"      {fact}"
    for title, table in finding.tables.items():
        yield f"      {title}"
        yield from (f"        {line}" for line in _aligned(table))


def _aligned(table: Table) -> Iterator[str]:
    rows = [tuple(table.columns), *(tuple(row) for row in table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    for row in rows:
        first, *rest = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join((first, *rest)).rstrip()


def page(found: Verification, command: str) -> str:
    """One HTML page; `command` makes it again."""
    made = Page(f"Verification of {found.path.name}")
    made.facts(_about(found))
    made.table("", SUMMARY, [_line(stage) for stage in found.stages])
    made.code(command)
    made.heading("How it is stored")
    made.table("", PLAN, _plan(found))
    made.heading("What it was shown")
    made.paragraph(TEXT, soft=True)
    if found.report.identity is not None and "pictures" in found.report.identity.takes:
        colours = ("red", "blue")
        made.gallery((picture(rectangle(c)), f"{QUESTION} (a {c} rectangle)") for c in colours)
    for stage in found.stages:
        _add(made, stage)
    return made.text()


SUMMARY = ("stage", "verdict", "seconds", "found")
PLAN = ("group", "stored as", "bits", "matrices", "MB")


def _about(found: Verification) -> Mapping[str, Cell]:
    report = found.report
    words = "Verified" if found.passed else "Not verified"
    facts: dict[str, Cell] = {
        "verdict": verdict(found.passed, words),
        "checkpoint": str(found.path),
    }
    if found.against is not None:
        facts["against"] = str(found.against)
    if report.identity is not None:
        facts["model"] = describe(report.identity)
    facts["made by"] = report.producer.name
    facts["plan"] = str(report.hash)
    return facts | {"cabochon": __version__}


def _line(stage: Stage) -> Sequence[Cell]:
    if not stage.run:
        return (stage.name, stage.verdict, "", stage.finding.summary)
    word = verdict(stage.passed, stage.verdict)
    return (stage.name, word, f"{stage.seconds:.1f}", stage.finding.summary)


def _plan(found: Verification) -> Sequence[Sequence[str]]:
    return [
        (row.group, row.scheme, str(row.bits), str(row.count), f"{row.bytes / 1e6:.2f}")
        for row in found.report.groups
    ]


def _add(made: Page, stage: Stage) -> None:
    finding = stage.finding
    if not stage.run:
        return
    made.heading(stage.name.capitalize(), verdict(stage.passed, stage.verdict))
    made.paragraph(finding.summary, soft=True)
    for sentence in (*finding.faults, *finding.facts):
        made.paragraph(sentence)
    for drawing, caption in finding.figures:
        made.figure(drawing, caption)
    for title, table in finding.tables.items():
        made.table(title, table.columns, table.rows)
