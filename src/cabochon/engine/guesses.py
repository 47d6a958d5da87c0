"""Guesses of what sequences say next, checked by the model in one step for little more than one.

Answers do not change: every token is drawn from the model's own logits, and a guess only counts if
it is the very token that was drawn. Where a sequence repeats itself, that is looked up
(`engine/lookup.py`); elsewhere a drafter guesses, if there is one (`engine/drafting.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from cabochon.engine.lookup import Lookup

if TYPE_CHECKING:
    from cabochon.engine.scheduler import TokenSequence

FIRST_REACH = 3
LONGEST_PAUSE = 16


class Reach:
    """How far to guess: further while guesses are right, and not at all for a while if not."""

    def __init__(self) -> None:
        self._reach = FIRST_REACH
        self._pause = 0  # tokens to be drawn without a guess
        self._last_pause = 0

    def now(self) -> int:
        """How many tokens to guess this time."""
        if self._pause:
            self._pause -= 1
            return 0
        return self._reach

    def judge(self, guessed: int, right: int) -> None:
        """Learn that the first `right` of `guessed` tokens were right."""
        if right:
            self._last_pause = 0
            self._reach = 2 * self._reach if right == guessed else right + 1
        else:
            self._last_pause = min(2 * self._last_pause + 1, LONGEST_PAUSE)
            self._pause, self._reach = self._last_pause, FIRST_REACH


class Guesses:
    """What is guessed of one sequence, and what there is to guess by."""

    def __init__(self) -> None:
        self.tokens: list[int] = []  # that may follow those that were drawn
        self.state: Tensor | None = None  # of the model, where it drew the latest token
        self._lookup = Lookup()
        self._looked_up, self._drafted = Reach(), Reach()
        self._by = self._looked_up  # whose these are

    def look_up(self, tokens: Sequence[int], most: int) -> None:
        """Guess up to `most` tokens behind `tokens`, if there they repeat themselves."""
        self._by, reach = self._looked_up, self._looked_up.now()
        self.tokens = self._lookup.guess(tokens, min(most, reach)) if reach else []

    def draft(self, most: int) -> int:
        """How many tokens a drafter shall guess, up to `most`."""
        self._by = self._drafted
        return min(most, self._drafted.now())

    def judge(self, right: int) -> None:
        """So many of the guesses were the tokens that have been drawn."""
        if self.tokens:
            self._by.judge(len(self.tokens), right)
        self.tokens = []


class Drafts(Protocol):
    """Guesses of a drafter, for many sequences at once."""

    def __call__(self, sequences: Sequence[TokenSequence], count: int) -> list[list[int]]: ...


class Guesser:
    """Guesses up to `most` tokens a step, among all sequences."""

    def __init__(self, most: int, drafts: Drafts | None = None) -> None:
        self.most = most
        self.drafts = drafts

    def __call__(self, sequences: Sequence[TokenSequence]) -> None:
        """Guess for `sequences`, each of which has its latest token left to compute."""
        asked: dict[TokenSequence, int] = {}
        for sequence in sequences:
            # The one that would be its last is not guessed.
            left = sequence.limit - len(sequence.tokens) - 1
            room = min((1 + self.most) // len(sequences) - 1, left)
            if room <= 0:
                continue
            sequence.guesses.look_up(sequence.tokens, room)
            if self.drafts is not None and not sequence.guesses.tokens:
                asked[sequence] = sequence.guesses.draft(room)
        longest = max(asked.values(), default=0)
        if self.drafts is None or not longest:
            return
        drafting = [sequence for sequence, count in asked.items() if count]
        for sequence, tokens in zip(drafting, self.drafts(drafting, longest), strict=True):
            sequence.guesses.tokens = tokens[: asked[sequence]]
