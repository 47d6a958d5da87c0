"""Drawings in SVG that read without colour: every series has a shape of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from cabochon.verify.page import Html

Points = Sequence[tuple[float, float, str]]  # x, y, and what a pointer resting there is told

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 26, 12, 44
COLOURS = 8
STEPS = (1, 2, 5)  # of a scale's numbers, in each power of ten
APART = 9.0  # pixels between series that stand at the same whole number


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to pixels; logarithmic if `log`."""

    low: float
    high: float
    start: float  # pixel of `low`
    stop: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, stop: float, *, log: bool) -> Axis:
        """An axis that holds all finite `values`; on a logarithmic one they are positive."""
        low, high = min(values), max(values)
        if log:
            low = max(v for v in _round_numbers(low) if v <= low)
            high = min(v for v in _round_numbers(high) if v >= high)
        if low == high:
            low, high = (low / 10, high * 10) if log else (low - 1, high + 1)
        return cls(low, high, start, stop, log)

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    @property
    def ticks(self) -> list[float]:
        if self.log:
            tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = STEPS if len(tens) <= 3 else STEPS[:1]
            marks = [step * 10.0**power for power in tens for step in steps]
            shown = [m for m in marks if self.low * 0.999 <= m <= self.high * 1.001]
            return shown[:: 1 + len(tens) // 9]
        raw = (self.high - self.low) / 7
        size = 10 ** math.floor(math.log10(raw))
        step = next(size * m for m in (*STEPS, 10) if size * m >= raw)
        count = math.floor((self.high - self.low) / step)
        first = math.ceil(self.low / step) * step
        return [v for i in range(count + 2) if (v := first + i * step) <= self.high * 1.0001]


def _round_numbers(near: float) -> list[float]:
    power = math.floor(math.log10(near))
    return [step * 10.0**p for p in (power - 1, power, power + 1) for step in STEPS]


def scatter(series: Mapping[str, Points], x: str, y: str, *, log: bool = False) -> Html:
    """Points of several series over the axes `x` and `y`; on a logarithmic y, zeros are left out.

    Over whole numbers series stand beside each other. An empty drawing says so.
    """
    kept = {
        name: [p for p in points if math.isfinite(p[1]) and (p[1] > 0 or not log)]
        for name, points in series.items()
    }
    everything = [p for points in kept.values() for p in points]
    if not everything:
        return Html('<p class="soft">Nothing to draw: no difference anywhere.</p>')
    places = [p[0] for p in everything]
    room = APART * len(kept) / 2 if all(place.is_integer() for place in map(float, places)) else 0
    across = Axis.over(places, LEFT + 10 + room, WIDTH - RIGHT - 10 - room, log=False)
    shift = _shift(across, len(kept)) if room else 0.0
    up = Axis.over([p[1] for p in everything], HEIGHT - BOTTOM, TOP, log=log)
    marks = "".join(
        _mark(
            index,
            across.at(px) + shift * (index - (len(kept) - 1) / 2),
            up.at(py),
            f"{name}: {text}",
        )
        for index, (name, points) in enumerate(kept.items())
        for px, py, text in points
    )
    drawing = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{escape(y)} over {escape(x)}">'
        f"{_frame(across, up, x, y)}{marks}</svg>"
    )
    return Html(f'<div class="wide">{drawing}</div>{_legend(list(kept))}')


def _shift(across: Axis, series: int) -> float:
    """Pixels from a series to the next, of which all fit between two whole numbers."""
    return min(APART, 0.8 * (across.at(1) - across.at(0)) / series)


def _frame(across: Axis, up: Axis, x: str, y: str) -> str:
    lines = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up.at(t):.1f}"'
        f' y2="{up.at(t):.1f}"/><text x="{LEFT - 6}" y="{up.at(t) + 4:.1f}"'
        f' text-anchor="end">{t:g}</text>'
        for t in up.ticks
    ]
    lines += [
        f'<text x="{across.at(t):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{t:g}</text>'
        for t in across.ticks
    ]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    lines.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y)}</text>"
    )
    return "".join(lines)


def _mark(index: int, x: float, y: float, text: str) -> str:
    colour, r = f"var(--c{index % COLOURS})", 3.5
    shapes = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}">',
        f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}" fill="{colour}">',
        f'<path d="M{x:.1f} {y - r - 1:.1f}l4.5 8h-9z" fill="{colour}">',
        f'<path d="M{x:.1f} {y - r - 1:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z" fill="{colour}">',
    )
    # with the second round of colours every colour gets another shape
    shape = shapes[(index + index // COLOURS) % len(shapes)]
    return f"{shape}<title>{escape(text)}</title>{_closing(shape)}"


def _closing(shape: str) -> str:
    return f"</{shape[1:].partition(' ')[0]}>"


def _legend(names: Sequence[str]) -> str:
    entries = "".join(
        f'<li><svg viewBox="0 0 10 10" aria-hidden="true">'
        f"{_mark(index, 5, 5, name)}</svg>{escape(name)}</li>"
        for index, name in enumerate(names)
    )
    return f'<ul class="legend">{entries}</ul>'
