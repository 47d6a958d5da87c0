"""Guesses of what sequences say next, checked by the model in one step for little more than one.

Answers do not change: every token is drawn from the model's own logits, and a guess only counts if
it is the very token that was drawn. What a grammar leaves no choice of is guessed first; where a
sequence repeats itself, that is looked up (`engine/lookup.py`); elsewhere a drafter guesses, if
there is one (`engine/drafts.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from cabochon.engine.lookup import Lookup

if TYPE_CHECKING:
    from cabochon.engine.scheduler import TokenSequence

logger = logging.getLogger(__name__)

# So many tokens for each of many sequences.
Drafts = Callable[[Sequence["TokenSequence"], int], list[list[int]]]

FIRST_REACH = 3
FAR = 64  # what is nearly certain is guessed as far as it is known
LONGEST_PAUSE = 16


class Reach:
    """How far to guess: further while guesses are right, and not at all for a while if not."""

    def __init__(self, first: int = FIRST_REACH) -> None:
        self._first = self._reach = first
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
            self._pause, self._reach = self._last_pause, self._first


class Guesses:
    """What is guessed of one sequence, and what there is to guess by."""

    def __init__(self) -> None:
        self.tokens: list[int] = []  # that may follow those that were drawn
        self.state: Tensor | None = None  # of the model, where it drew the latest token
        self.forced: Callable[[], Sequence[int]] = tuple  # what must come next, as far as is known
        self._lookup = Lookup()
        self._forced, self._looked_up, self._drafted = Reach(FAR), Reach(), Reach()
        self._by = self._forced  # whose these are
        self.failed = False

    def find(self, tokens: Sequence[int], most: int) -> None:
        """Guess up to `most` tokens behind `tokens`: what must come, or what came there before."""
        if reach := self._forced.now():
            self._by = self._forced
            self.tokens = list(self.forced()[: min(most, reach)])
        if not self.tokens and (reach := self._looked_up.now()):
            self._by = self._looked_up
            self.tokens = self._lookup.guess(tokens, min(most, reach))

    def draft(self, most: int) -> int:
        """How many tokens a drafter shall guess, up to `most`.

        None where nothing was drawn: a prompt's last token may have a step of its own.
        """
        if self.state is None:
            return 0
        self._by = self._drafted
        return min(most, self._drafted.now())

    def judge(self, right: int) -> None:
        """So many of the guesses were the tokens that have been drawn."""
        if self.tokens:
            self._by.judge(len(self.tokens), right)
        self.tokens = []


class Guesser:
    """Guesses up to `most` tokens a step, among all sequences; a drafter up to `drafted` for each.

    No request fails for what goes wrong in guessing: it is logged, and who failed guesses no more.
    """

    def __init__(self, most: int, drafts: Drafts | None = None, drafted: int | None = None) -> None:
        self.most = most
        self.drafts = drafts
        self.drafted = most if drafted is None else drafted

    def __call__(self, sequences: Sequence[TokenSequence]) -> None:
        """Guess for `sequences`, each of which has its latest token left to compute."""
        asked: dict[TokenSequence, int] = {}
        for sequence in sequences:
            # The one that would be its last is not guessed.
            left = sequence.limit - len(sequence.tokens) - 1
            room = min((1 + self.most) // len(sequences) - 1, left)
            if room <= 0:
                continue
            if not sequence.guesses.failed:
                self._find(sequence, room)
            if self.drafts is not None and not sequence.guesses.tokens:
                asked[sequence] = sequence.guesses.draft(min(room, self.drafted))
        self._draft({sequence: count for sequence, count in asked.items() if count})

    def _find(self, sequence: TokenSequence, room: int) -> None:
        try:
            sequence.guesses.find(sequence.tokens, room)
        except Exception:
            logger.exception("what a request says next cannot be guessed: it goes on without")
            sequence.guesses.failed = True

    def _draft(self, asked: dict[TokenSequence, int]) -> None:
        if self.drafts is None or not asked:
            return
        try:
            drafted = self.drafts(list(asked), max(asked.values()))
        except Exception:
            logger.exception("the drafter failed: from now on it is not asked")
            self.drafts = None
            return
        for (sequence, count), tokens in zip(asked.items(), drafted, strict=True):
            sequence.guesses.tokens = tokens[:count]
