"""A report as one HTML page: no script, nothing from elsewhere, light and dark, printable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

_STYLE = files("cabochon.verify").joinpath("page.css").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Html:
    """Markup that is ready to be written; everything else is escaped."""

    text: str


Cell = str | Html


def markup(cell: Cell) -> str:
    return cell.text if isinstance(cell, Html) else escape(cell)


def verdict(passed: bool, words: str) -> Html:
    """Words in the colour of what they say; the words say it too."""
    return Html(f'<span class="verdict {"good" if passed else "bad"}">{escape(words)}</span>')


@dataclass(slots=True)
class Page:
    """Collects sections from top to bottom."""

    title: str
    _parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: Cell, *, soft: bool = False) -> None:
        self._parts.append(f"<p{' class=soft' if soft else ''}>{markup(text)}</p>")

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """The first column holds names; the others are aligned as numbers."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
        lines = "".join(f"<tr>{_cells(row)}</tr>" for row in rows)
        body = f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody>"
        self._parts.append(f'<div class="wide"><table>{body}</table></div>')

    def figure(self, drawing: Html, caption: str) -> None:
        text = f"<figcaption>{escape(caption)}</figcaption>"
        self._parts.append(f"<figure>{drawing.text}{text}</figure>")

    def text(self) -> str:
        """The page."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>"
            f"<body><h1>{escape(self.title)}</h1>{''.join(self._parts)}</body></html>\n"
        )


def _cells(row: Sequence[Cell]) -> str:
    first, *rest = row
    return f'<td class="name">{markup(first)}</td>' + "".join(
        f"<td>{markup(cell)}</td>" for cell in rest
    )
