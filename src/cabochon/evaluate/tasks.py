"""Questions with answers, from local files in the formats they are published in.

| task | file | right |
|---|---|---|
| `gsm8k` | JSON lines: `question`, and `answer` that ends in `#### 42` | the last number is that |
| `screenspot-pro` | its annotations, with `images` beside their folder | the point is in the box |
| `questions` | JSON lines: `question`, `answer`, perhaps `image` and `kind` | word for word |
| `perplexity` | any text | see `perplexity.py` |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cabochon.errors import UnreadableError
from cabochon.files import parse_json

Check = Callable[[str], bool]

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
COORDINATE = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, with a picture or without, and whether an answer is right.

    Attributes:
        where: file and line, for errors.
        wanted: the right answer, for people.
        kind: what it is counted under beside the whole; empty if all are alike.
    """

    where: str
    text: str
    wanted: str
    right: Check
    image: Path | None = None
    kind: str = ""


def read(task: str, data: Path) -> Iterator[Question]:
    """The questions of `task` in the file or folder `data`, in their order.

    Of pictures only the headers are read.

    Raises:
        UnreadableError: it cannot be read, or is not in the task's format; with file and line.
    """
    return TASKS[task](data)


def _gsm8k(data: Path) -> Iterator[Question]:
    for where, row in _lines(data, "question", "answer"):
        found = re.search(r"####\s*(\S+)\s*$", row["answer"])
        wanted = None if found is None else _number(found[1])
        if wanted is None:
            raise UnreadableError(f"{where}: the answer does not end in '#### ' and a number")
        text = row["question"] + GSM8K_PROMPT
        yield Question(where, text, f"{wanted:g}", _last_number_is(wanted))


GSM8K_PROMPT = "\n\nThink step by step. End with a line that has only '#### ' and the number."


def _last_number_is(wanted: float) -> Check:
    def right(answer: str) -> bool:
        marked = answer.rpartition("####")[2]
        numbers = NUMBER.findall(marked)
        return bool(numbers) and _number(numbers[-1]) == wanted

    return right


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").strip("$."))
    except ValueError:
        return None


def _questions(data: Path) -> Iterator[Question]:
    for where, row in _lines(data, "question", "answer"):
        image, kind = (_text(where, row, key) for key in ("image", "kind"))
        yield Question(
            where,
            row["question"],
            row["answer"],
            _is(row["answer"]),
            None if image is None else _picture(where, data.parent, image),
            kind or "",
        )


def _text(where: str, row: Mapping[str, Any], key: str) -> str | None:
    value = row.get(key)
    if not (value is None or isinstance(value, str)):
        raise UnreadableError(f"{where}: expected text under {key!r}")
    return value


def _picture(where: str, folder: Path, name: str) -> Path:
    """The file `name` in `folder`, of which at least the header is a picture's."""
    path = folder / name
    if ".." in Path(name).parts or not path.is_file():
        raise UnreadableError(f"{where}: there is no picture {path}")
    try:
        Image.open(path).close()
    except (OSError, Image.DecompressionBombError) as error:
        raise UnreadableError(f"{where}: {path} is no picture that can be read: {error}") from None
    return path


def _is(wanted: str) -> Check:
    return lambda answer: answer.strip() == wanted.strip()


def _screenspot_pro(data: Path) -> Iterator[Question]:
    files = sorted(data.glob("*.json")) if data.is_dir() else [data]
    if not files:
        raise UnreadableError(f"{data} holds no .json annotations")
    for file in files:
        for where, row in _rows(file, read_text(file)):
            yield _click(where, row, _images(file))


SCREENSPOT_PROMPT = (
    "Where would you click to do this: {instruction}\nAnswer with JSON alone:"
    ' {{"point": [y, x]}}, where both go from 0 (top, left) to 1000 (bottom, right).'
)


def _images(annotations: Path) -> Path:
    return annotations.resolve().parent.parent / "images"


def _click(where: str, row: Mapping[str, Any], images: Path) -> Question:
    name, instruction = row.get("img_filename"), row.get("instruction")
    if not (isinstance(name, str) and isinstance(instruction, str)):
        raise UnreadableError(f"{where}: expected img_filename and instruction")
    box, size = _numbers(row.get("bbox"), 4), _numbers(row.get("img_size"), 2)
    if box is None or size is None:
        raise UnreadableError(f"{where}: expected bbox of 4 numbers and img_size of 2")
    image = _picture(where, images, name)
    text = SCREENSPOT_PROMPT.format(instruction=instruction)
    wanted, kind = f"within {box} of {size}", _text(where, row, "ui_type") or ""
    return Question(where, text, wanted, _within(box, size), image, kind)


def _within(box: list[float], size: list[float]) -> Check:
    left, top, right, bottom = box

    def hit(answer: str) -> bool:
        point = clicked(answer)
        if point is None:
            return False
        x, y = point[0] * size[0], point[1] * size[1]
        return left <= x <= right and top <= y <= bottom

    return hit


def clicked(answer: str) -> tuple[float, float] | None:
    """The point an answer names, as shares of width and height: a point, or the middle of a box.

    Gemma writes vertical coordinates first, in thousandths: `{"point": [y, x]}` or
    `{"box_2d": [top, left, bottom, right]}`.
    """
    point = re.search(r'"point"\s*:\s*\[([^\]]*)\]', answer)
    box = re.search(r'"box_2d"\s*:\s*\[([^\]]*)\]', answer)
    values = [float(v) for v in COORDINATE.findall((point or box or [""] * 2)[1])]
    if point and len(values) == 2:
        return values[1] / 1000, values[0] / 1000
    if box and not point and len(values) == 4:
        top, left, bottom, right = values
        return (left + right) / 2000, (top + bottom) / 2000
    return None


def _numbers(value: Any, count: int) -> list[float] | None:
    numeric = isinstance(value, list) and all(type(v) in (int, float) for v in value)
    return list(value) if numeric and len(value) == count else None


def _lines(data: Path, *keys: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Rows of a file of JSON lines, each with text under `keys`."""
    found = False
    for number, line in enumerate(read_text(data).splitlines(), 1):
        if not line.strip():
            continue
        found, where = True, f"{data}:{number}"
        row = _json(where, line)
        for key in keys:
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise UnreadableError(f"{where}: expected an object with text under {key!r}")
        yield where, row
    if not found:
        raise UnreadableError(f"{data} holds no questions")


def _rows(file: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = _json(str(file), text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UnreadableError(f"{file}: expected a list of objects")
    for index, row in enumerate(rows):
        yield f"{file}, entry {index}", row


def _json(where: str, text: str) -> Any:
    try:
        return parse_json(text.encode())
    except ValueError as error:
        raise UnreadableError(f"{where} is not valid JSON: {error}") from None


def read_text(path: Path) -> str:
    """A text file. UnreadableError if it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UnreadableError(f"{path} cannot be read: {reason}") from None


TASKS: Mapping[str, Callable[[Path], Iterator[Question]]] = {
    "gsm8k": _gsm8k,
    "screenspot-pro": _screenspot_pro,
    "questions": _questions,
}
