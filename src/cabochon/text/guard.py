"""Text of strangers on its way through a chat template: what spells a special token stays text.

A tokenizer finds special tokens wherever their names stand. What a user writes must not open a turn
or be a picture, so names are cut by a mark before the template sees them, and a prompt is tokenized
in the pieces between the marks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cabochon.errors import RequestError
from cabochon.text.tokenizer import Tokenizer

# Characters for private use; the first that the texts do not have is the mark.
_MARKS = [chr(code) for code in (*range(0xE000, 0xE100), *range(0xF0000, 0xF0100))]


class Guard:
    """For the texts of one prompt: `values` are all that goes into the template from outside.

    Raises:
        RequestError: the texts have every character that could be a mark.
    """

    def __init__(self, tokenizer: Tokenizer, *values: Any) -> None:
        self._tokenizer = tokenizer
        self._names = tokenizer.names
        used: set[str] = set()
        for text in _texts(values):
            if not text.isascii():
                used.update(text)
        mark = next((mark for mark in _MARKS if mark not in used), None)
        if mark is None:
            raise RequestError("the texts have too many characters of private use", "messages")
        self._mark = mark

    def protect(self, value: Any) -> Any:
        """`value` with every text in it cut; what is neither text nor JSON stays as it is."""
        if isinstance(value, str):
            return self._names.sub(lambda name: name[0][0] + self._mark + name[0][1:], value)
        if isinstance(value, Mapping):
            return {self.protect(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item) for item in value]
        return value

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt: special tokens are the template's alone."""
        pieces = text.split(self._mark)
        return [token for piece in pieces for token in self._tokenizer.encode(piece)]

    def plain(self, text: str) -> str:
        """A rendered prompt as a person would read it, without marks."""
        return text.replace(self._mark, "")


def _texts(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _texts(value.keys())
            yield from _texts(value.values())
        elif isinstance(value, list | tuple):
            yield from _texts(value)
