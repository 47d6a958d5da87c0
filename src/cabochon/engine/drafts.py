"""Guesses of what an answer says next, looked up in what was said before.

Answers repeat: code that is edited, a text that is quoted, the keys of a record. Where the last few
tokens stood before, what followed them is guessed to follow again, and the model checks a row of
guesses in one step for little more than the price of one token, as weights are read once. Answers
do not change: every token is drawn from the model's own logits, and a guess only counts if it is
the very token that was drawn.

"Prompt lookup decoding" (A. Saxena, 2023); no second model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_ALIKE = 2  # tokens that must stand alike before a guess
MOST_ALIKE = 8  # more of them make no better guess
FIRST_REACH = 3
LONGEST_PAUSE = 16


class Drafter:
    """Guesses for one sequence: more at a time while they are right, none for a while if not."""

    def __init__(self) -> None:
        self._tokens = np.empty(256, dtype=np.int32)
        self._length = 0
        self._reach = FIRST_REACH
        self._pause = 0  # tokens to be drawn without a guess
        self._last_pause = 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, which only ever grow."""
        self._read(tokens)
        if self._pause:
            self._pause -= 1
            return []
        return self._look_up(min(most, self._reach))

    def judge(self, guessed: int, right: int) -> None:
        """Learn that the first `right` of `guessed` tokens were right."""
        if right:
            self._last_pause = 0
            self._reach = 2 * self._reach if right == guessed else right + 1
        else:
            self._last_pause = min(2 * self._last_pause + 1, LONGEST_PAUSE)
            self._pause, self._reach = self._last_pause, FIRST_REACH

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
