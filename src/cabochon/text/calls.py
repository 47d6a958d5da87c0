"""Gemma 4's syntax of a tool call, `call:name{key:<|"|>text<|"|>,n:1}`, to JSON arguments.

Quotes are a token of their own, so text inside them needs no escapes and is never read as syntax.
Numbers go into the JSON as they were written: none is rounded, none is too large.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")

_MOST_DEPTH = 64
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_JSON_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
# `None` is how the chat template shows null in the calls of a history.
_WORDS = {"true": "true", "false": "false", "null": "null", "None": "null"}
_KEY_ENDS = frozenset(':,{}[]"')
_VALUE_ENDS = frozenset(',{}[]"')


class MalformedCall(ValueError):
    """What stands between the tokens of a call is not one."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Quoted:
    """Text between two quote tokens."""

    text: str


def parse_call(pieces: Sequence[str | Quoted]) -> ToolCall:
    """The call that `pieces`, texts and quoted texts in their order, write.

    Raises:
        MalformedCall: they write none, or a part of them is not of the call.
    """
    reader = _Reader(pieces)
    reader.space()
    for letter in "call:":
        reader.take(letter)
    name = reader.until(frozenset("{")).strip()
    if not NAME.fullmatch(name):
        raise MalformedCall(f"{name[:64]!r} is not the name of a function")
    arguments = reader.mapping(0)
    reader.space()
    if reader.next is not None:
        raise MalformedCall("something follows the arguments")
    return ToolCall(name, arguments)


class _Reader:
    """Reads pieces one character, or one quoted text, at a time."""

    def __init__(self, pieces: Sequence[str | Quoted]) -> None:
        self._items: list[str | Quoted] = []
        for piece in pieces:
            self._items.extend([piece] if isinstance(piece, Quoted) else piece)
        self._at = 0

    @property
    def next(self) -> str | Quoted | None:
        return self._items[self._at] if self._at < len(self._items) else None

    def space(self) -> None:
        while isinstance(self.next, str) and self.next.isspace():
            self._at += 1

    def take(self, wanted: str) -> None:
        if self.next != wanted:
            raise MalformedCall(f"expected {wanted!r}")
        self._at += 1

    def took(self, wanted: str) -> bool:
        self.space()
        found = self.next == wanted
        self._at += found
        return found

    def until(self, ends: frozenset[str]) -> str:
        """Text up to one of `ends`, a quoted text, or the end."""
        start = self._at
        while isinstance(self.next, str) and self.next not in ends:
            self._at += 1
        return "".join(str(item) for item in self._items[start : self._at])

    def mapping(self, depth: int) -> str:
        self.take("{")
        pairs: list[str] = []  # a key given twice is there twice, as it was written
        while not self.took("}"):
            if pairs:
                self.take(",")
            key = self._key()
            self.space()
            self.take(":")
            pairs.append(f"{_json(key)}: {self._value(depth + 1)}")
        return "{" + ", ".join(pairs) + "}"

    def _sequence(self, depth: int) -> str:
        self.take("[")
        values: list[str] = []
        while not self.took("]"):
            if values:
                self.take(",")
            values.append(self._value(depth + 1))
        return "[" + ", ".join(values) + "]"

    def _key(self) -> str:
        self.space()
        item = self.next
        if isinstance(item, Quoted):
            self._at += 1
            return item.text
        if item == '"':
            return str(json.loads(self._json_string()))
        key = self.until(_KEY_ENDS).strip()
        if not key:
            raise MalformedCall("expected a key")
        return key

    def _value(self, depth: int) -> str:
        """One value, as JSON."""
        if depth > _MOST_DEPTH:
            raise MalformedCall("the arguments are nested too deep")
        self.space()
        item = self.next
        if isinstance(item, Quoted):
            self._at += 1
            return _json(item.text)
        if item == "{":
            return self.mapping(depth)
        if item == "[":
            return self._sequence(depth)
        if item == '"':
            return self._json_string()
        word = self.until(_VALUE_ENDS).strip()
        if not word:
            raise MalformedCall("expected a value")
        if _NUMBER.fullmatch(word):
            return word
        return _WORDS.get(word) or _json(word)  # a word without quotes is text all the same

    def _json_string(self) -> str:
        """A string as JSON writes it, which models that saw much JSON do at times."""
        start = self._at
        self._at += 1
        escaped = False
        while (item := self.next) != '"' or escaped:
            if not isinstance(item, str):
                raise MalformedCall("a string does not end")
            escaped = item == "\\" and not escaped
            self._at += 1
        self._at += 1
        written = "".join(str(item) for item in self._items[start : self._at])
        try:
            if _JSON_STRING.fullmatch(written):
                return _json(json.loads(written))
        except ValueError:
            pass
        raise MalformedCall("a string is not valid JSON")


def _json(text: str) -> str:
    # Half a surrogate pair, which JSON can escape and UTF-8 cannot hold, is no character.
    return json.dumps(text.encode(errors="replace").decode(), ensure_ascii=False)
