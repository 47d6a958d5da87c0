"""Guesses of what an answer says next, looked up in what was said before.

Answers repeat: code that is edited, a text that is quoted, the keys of a record. Where the last few
tokens stood before, what followed them is guessed to follow again.

"Prompt lookup decoding" (A. Saxena, 2023); no second model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_ALIKE = 2  # tokens that must stand alike before a guess
MOST_ALIKE = 8  # more of them make no better guess


class Lookup:
    """Guesses for one sequence."""

    def __init__(self) -> None:
        self._tokens = np.empty(256, dtype=np.int32)
        self._length = 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, which only ever grow."""
        self._read(tokens)
        return self._look_up(most)

    def _read(self, tokens: Sequence[int]) -> None:
        if len(tokens) > len(self._tokens):
            room = np.empty(2 * len(tokens), dtype=np.int32)
            room[: self._length] = self._tokens[: self._length]
            self._tokens = room
        self._tokens[self._length : len(tokens)] = tokens[self._length :]
        self._length = len(tokens)

    def _look_up(self, most: int) -> list[int]:
        """What followed the latest of the places that are most alike."""
        tokens, last = self._tokens, self._length - 1
        places = np.flatnonzero(tokens[:last] == tokens[last])
        for back in range(1, MOST_ALIKE):
            alike = places[places >= back]
            alike = alike[tokens[alike - back] == tokens[last - back]]
            if not len(alike):
                if back < LEAST_ALIKE:
                    return []
                break
            places = alike
        if not len(places):
            return []
        distance = last - int(places[-1])
        guesses: list[int] = []
        for i in range(most):  # what repeats at a shorter distance than is guessed goes round
            known = last + 1 + i - distance
            guesses.append(int(tokens[known]) if i < distance else guesses[i - distance])
        return guesses
