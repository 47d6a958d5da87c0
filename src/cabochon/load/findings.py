"""What is said of many names at once: each finding a single time, names as few patterns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 4  # findings of a kind, and names of a finding, that a terminal gets to see


@dataclass(frozen=True, slots=True)
class Finding:
    """The same thing said of several names, which are written as few patterns."""

    kind: str
    where: tuple[str, ...]
    count: int
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return {"where": list(self.where), "count": self.count, "detail": self.detail}

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        more = len(self.where) - MOST
        kind = f"{self.kind:<8}" if self.kind else ""
        times = f"  x{self.count}" if self.count > 1 else ""
        for i, where in enumerate(self.where[:MOST]):
            yield f"  {kind if i == 0 else ' ' * len(kind)}{where}{times if i == 0 else ''}"
        if more > 0:
            yield f"  {' ' * len(kind)}and {more} more like these"
        yield f"    {' ' * len(kind)}{self.detail}"


def findings(entries: Iterable[tuple[str, str, int, str]]) -> tuple[Finding, ...]:
    """Entries (kind, where, count, detail) with the same kind and detail become one finding."""
    merged: dict[tuple[str, str], tuple[list[str], list[int]]] = {}
    for kind, where, count, detail in entries:
        names, counts = merged.setdefault((kind, detail), ([], []))
        names.append(where)
        counts.append(count)
    return tuple(
        Finding(kind, collapse(names), sum(counts), detail)
        for (kind, detail), (names, counts) in merged.items()
    )


def collapse(names: Iterable[str]) -> tuple[str, ...]:
    """`names` with numbered components written as ranges: `layers.{0-3,7}.mlp.up_proj`.

    Names that differ in several numbers are collapsed in the first of them only.
    """
    templates: dict[tuple[str, str], list[int]] = {}
    plain: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if _is_number(part)), None)
        if at is None:
            plain[name] = None
        else:
            key = (".".join(parts[:at]), ".".join(parts[at + 1 :]))
            templates.setdefault(key, []).append(int(parts[at]))
    collapsed = [
        ".".join(filter(None, (before, _ranges(numbers), after)))
        for (before, after), numbers in templates.items()
    ]
    return (*plain, *collapsed)


def _is_number(part: str) -> bool:
    """Written as numbers are: `01` is a name of its own."""
    return part.isdecimal() and (part == "0" or part[0] != "0")


def _ranges(numbers: Sequence[int]) -> str:
    """`{0-3,7}` of 0, 1, 2, 3, 7; a single number as it is."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(str(end) for end in run) for run in runs)
    return text if text.isdecimal() else f"{{{text}}}"
