"""A report as one HTML page: no script, nothing from elsewhere, light and dark, printable."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from io import BytesIO

from PIL import Image

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


def picture(image: Image.Image) -> Html:
    """A picture inside the page itself."""
    file = BytesIO()
    image.save(file, "PNG")
    data, (width, height) = b64encode(file.getvalue()).decode(), image.size
    return Html(
        f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="">'
    )


@dataclass(slots=True)
class Page:
    """Collects sections from top to bottom."""

    title: str
    _parts: list[str] = field(default_factory=list)

    def heading(self, text: str, aside: Html = Html("")) -> None:
        self._parts.append(f"<h2>{escape(text)} {aside.text}</h2>")

    def paragraph(self, text: Cell, *, soft: bool = False) -> None:
        self._parts.append(f"<p{' class=soft' if soft else ''}>{_breakable(markup(text))}</p>")

    def code(self, text: str) -> None:
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def facts(self, facts: Mapping[str, Cell]) -> None:
        """What is told in a word or two, each under its name."""
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd>{_breakable(markup(fact))}</dd>"
            for name, fact in facts.items()
        )
        self._parts.append(f"<dl>{rows}</dl>")

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Columns that hold numbers alone are aligned as such; the title may be empty."""
        lines = list(rows)
        kinds = [_kind([line[index] for line in lines]) for index in range(len(columns))]
        head = "".join(
            f'<th scope="col"{kind}>{escape(column)}</th>'
            for column, kind in zip(columns, kinds, strict=True)
        )
        body = "".join(f"<tr>{_cells(line, kinds)}</tr>" for line in lines)
        caption = f"<caption>{escape(title)}</caption>" if title else ""
        inside = f"{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        self._parts.append(f'<div class="wide"><table>{inside}</table></div>')

    def figure(self, drawing: Html, caption: str) -> None:
        text = f"<figcaption>{escape(caption)}</figcaption>"
        self._parts.append(f"<figure>{drawing.text}{text}</figure>")

    def gallery(self, shown: Iterable[tuple[Html, str]]) -> None:
        """Small figures side by side."""
        self._parts.append('<div class="gallery">')
        for drawing, caption in shown:
            self.figure(drawing, caption)
        self._parts.append("</div>")

    def text(self) -> str:
        """The page."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<link rel="icon" href="data:,">'  # or browsers ask for one
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>"
            f"<body><h1>{escape(self.title)}</h1>{''.join(self._parts)}</body></html>\n"
        )


_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?%?|inf|nan|equal|\d+ of \d+|")
_PATH = re.compile(r"[A-Za-z_]\w*(?:\.\w+){2,}")


def _kind(cells: Iterable[Cell]) -> str:
    numbers = all(isinstance(cell, str) and _NUMBER.fullmatch(cell) for cell in cells)
    return " class=number" if numbers else ""


def _cells(row: Sequence[Cell], kinds: Sequence[str]) -> str:
    return "".join(
        f"<td{kind}>{_breakable(markup(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)
    )


def _breakable(text: str) -> str:
    """Paths of modules in the face of code, which lines may break at dots."""
    return _PATH.sub(lambda path: f"<code>{path[0].replace('.', '.<wbr>')}</code>", text)
