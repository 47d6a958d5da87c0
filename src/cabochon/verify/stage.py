"""A stage of a verification: what it found, and whether that is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cabochon.verify.page import Html

Progress = Callable[[int, int], None]  # how much of a stage is done, and of how much


@dataclass(frozen=True, slots=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(slots=True)
class Finding:
    """What a stage reports. Without `faults` it has passed.

    Attributes:
        summary: the verdict in a sentence.
        faults: why it has not passed, the worst first.
        facts: figures for people.
        tables: by their titles.
        figures: drawings with captions.
        data: the same for machines.
    """

    summary: str
    faults: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)
    figures: list[tuple[Html, str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stage:
    """A finding with its name and how long it took; one that was not run says why."""

    name: str
    finding: Finding
    seconds: float
    run: bool = True

    @property
    def passed(self) -> bool:
        return not self.finding.faults

    @property
    def verdict(self) -> str:
        if not self.run:
            return "not run"
        return "passed" if self.passed else "failed"


def timed(name: str, work: Callable[[], Finding]) -> Stage:
    started = time.monotonic()
    finding = work()
    return Stage(name, finding, time.monotonic() - started)


def left_out(name: str, reason: str) -> Stage:
    return Stage(name, Finding(reason), 0.0, run=False)
