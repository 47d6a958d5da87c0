"""Regular expressions from strangers, matched in bounded time.

Backtracking takes time exponential in a name's length for `(\\w+\\.?)+!`. Here a piece of an
expression takes the set of positions where it may begin to the set of those where it may end, and
sets are integers with a bit for each position. Python's own parser says what an expression means;
what cannot be done with sets (backreferences and atomic groups) is refused, and so is what no rule
about module names needs (flags, long expressions, deep nesting).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from re import _constants as op  # type: ignore[attr-defined]  # typeshed lacks both
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 300  # characters of an expression
MAX_NESTING = 2  # repeated groups and assertions within each other

Items = tuple[tuple[Any, Any], ...]  # of a character class, as the parser has them
Piece = Callable[[int, "Name"], int]


class UnsupportedRegex(ValueError):
    """An expression that is malformed, or that is not matched here; the text says why."""


class Class(dict[int, str]):
    """A character class: "1" for the characters of it, "0" for others, filled as they occur."""

    def __init__(self, items: Items) -> None:
        self._negated = items[0][0] is op.NEGATE
        self._items = items[self._negated :]

    def __missing__(self, code: int) -> str:
        inside = any(_is(code, *item) for item in self._items) != self._negated
        self[code] = "1" if inside else "0"
        return self[code]


class Name:
    """A text as sets of positions, those of a character class computed once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._backwards = text[::-1]
        self._found: dict[int, int] = {}

    def positions(self, kind: Class) -> int:
        """Where a character of `kind` stands."""
        found = self._found.get(id(kind))
        if found is None:
            found = int(self._backwards.translate(kind) or "0", 2)
            self._found[id(kind)] = found
        return found


class Regex:
    """An expression that is matched from the beginning of a name, as `re.match` does."""

    def __init__(self, expression: str) -> None:
        if len(expression) > MAX_LENGTH:
            raise UnsupportedRegex(f"it is longer than {MAX_LENGTH} characters")
        try:
            parsed = parser.parse(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise UnsupportedRegex(f"it is no regular expression: {error}") from None
        if parsed.state.flags & ~re.UNICODE:
            raise UnsupportedRegex("flags are not supported")
        self._piece = _sequence(parsed, MAX_NESTING)

    def match(self, name: str) -> bool:
        return bool(self._piece(1, _name(name)))


@lru_cache(maxsize=1024)
def _name(text: str) -> Name:
    return Name(text)


def _sequence(parsed: Iterable[tuple[Any, Any]], depth: int) -> Piece:
    pieces = [_piece(kind, argument, depth) for kind, argument in parsed]

    def apply(starts: int, name: Name) -> int:
        for piece in pieces:
            if not starts:
                break
            starts = piece(starts, name)
        return starts

    return pieces[0] if len(pieces) == 1 else apply


def _piece(kind: Any, argument: Any, depth: int) -> Piece:
    chars = _class_of(kind, argument)
    if chars is not None:
        return lambda starts, name: (starts & name.positions(chars)) << 1
    if kind in (op.MAX_REPEAT, op.MIN_REPEAT):  # greedy or not, the same matches
        least, most, inner = argument
        return _repeat(least, most, inner, depth)
    if kind is op.BRANCH:
        return _any_of([_sequence(branch, depth) for branch in argument[1]])
    if kind is op.SUBPATTERN:
        _, on, off, inner = argument
        if on or off:
            raise UnsupportedRegex("flags are not supported")
        return _sequence(inner, depth)
    if kind in (op.ASSERT, op.ASSERT_NOT):
        return _look(*argument, wanted=kind is op.ASSERT, depth=depth)
    if kind is op.AT and argument in _ANCHORS:
        anchor = _ANCHORS[argument]
        return lambda starts, name: starts & anchor(name)
    raise UnsupportedRegex(f"{str(kind).lower().replace('_', ' ')} is not supported")


def _class_of(kind: Any, argument: Any) -> Class | None:
    """The class of characters that a piece of one character stands for."""
    if kind is op.IN:
        return _class(tuple(argument))
    if kind is op.ANY:
        return _class(((op.NEGATE, None), (op.LITERAL, ord("\n"))))
    return _class(((kind, argument),)) if kind in (op.LITERAL, op.NOT_LITERAL) else None


@cache
def _class(items: Items) -> Class:
    """One object for a class, never freed, so that its id stands for it."""
    return Class(items)


def _is(code: int, kind: Any, argument: Any) -> bool:
    if kind is op.RANGE:
        return bool(argument[0] <= code <= argument[1])
    if kind is op.CATEGORY:
        return _CATEGORIES[argument](chr(code))
    return bool((code == argument) == (kind is op.LITERAL))


def _any_of(pieces: Sequence[Piece]) -> Piece:
    def apply(starts: int, name: Name) -> int:
        ends = 0
        for piece in pieces:
            ends |= piece(starts, name)
        return ends

    return apply


def _repeat(least: int, most: int, inner: Sequence[tuple[Any, Any]], depth: int) -> Piece:
    chars = _class_of(*inner[0]) if len(inner) == 1 else None
    if chars is not None and least < 2 and most is op.MAXREPEAT:
        return _run(chars, least)
    piece = _sequence(inner, _deeper(depth))

    def apply(starts: int, name: Name) -> int:
        for _ in range(least):
            ends = piece(starts, name)
            if ends == starts:
                break
            starts = ends
        reached = new = starts
        for _ in range(int(most) - least):
            new = piece(new, name) & ~reached
            if not new:
                break
            reached |= new
        return reached

    return apply


def _run(chars: Class, least: int) -> Piece:
    """`[chars]*` or `[chars]+`: adding a bit to a run of ones carries through to its end."""

    def apply(starts: int, name: Name) -> int:
        inside = name.positions(chars)
        first = starts & inside
        passed = (((inside + first) ^ inside) | first) & inside
        ends = passed << 1
        return ends if least else ends | starts

    return apply


def _look(direction: int, inner: Sequence[tuple[Any, Any]], *, wanted: bool, depth: int) -> Piece:
    piece = _sequence(inner, _deeper(depth))
    width = inner.getwidth()[0] if direction < 0 else 0  # type: ignore[attr-defined]

    def behind(starts: int, name: Name) -> int:
        found = piece(starts >> width, name) & starts
        return found if wanted else starts & ~found

    def ahead(starts: int, name: Name) -> int:
        found = 0
        for position in range(starts.bit_length()):
            bit = 1 << position
            if starts & bit and bool(piece(bit, name)) == wanted:
                found |= bit
        return found

    return behind if direction < 0 else ahead


def _deeper(depth: int) -> int:
    if not depth:
        raise UnsupportedRegex(f"groups are repeated more than {MAX_NESTING} deep")
    return depth - 1


def _end(name: Name) -> int:
    """`$` also matches before a newline that ends the text."""
    last = 1 << len(name.text)
    return last | last >> 1 if name.text.endswith("\n") else last


def _boundaries(name: Name) -> int:
    words = name.positions(_class(((op.CATEGORY, op.CATEGORY_WORD),)))
    return words ^ words << 1


_ANCHORS: dict[Any, Callable[[Name], int]] = {
    op.AT_BEGINNING: lambda name: 1,
    op.AT_BEGINNING_STRING: lambda name: 1,
    op.AT_END: _end,
    op.AT_END_STRING: lambda name: 1 << len(name.text),
    op.AT_BOUNDARY: _boundaries,
    op.AT_NON_BOUNDARY: lambda name: ~_boundaries(name),
}


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    op.CATEGORY_WORD: _is_word,
    op.CATEGORY_NOT_WORD: lambda char: not _is_word(char),
}
