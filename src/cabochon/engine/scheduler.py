"""Which positions of which sequences the next step computes.

Decoding goes first, one token a sequence and what is guessed to follow; prompts fill what is left
of the step. When pages run out, the sequence that came last gives its own back and is computed anew
later, so that the one that came first always goes on: an accepted request does not die of memory.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from cabochon.engine.cache import PAGE, Chunk, PagedCache, PageTable
from cabochon.engine.guesses import Guesser, Guesses
from cabochon.engine.pool import Name, Named
from cabochon.engine.prefixes import Mark, marks, name_page, root
from cabochon.gemma4.pictures import Picture
from cabochon.gemma4.sounds import Sound
from cabochon.nn.attention import Spans


@dataclass(slots=True, eq=False)
class TokenSequence:
    """A request's tokens and how far they are computed."""

    table: PageTable
    tokens: list[int]  # the prompt's and those generated
    media: dict[int, Picture | Sound]  # by first position, until they are encoded
    whole: Spans = ()  # pictures whose tokens see each other: no chunk ends inside one
    computed: int = 0  # tokens whose keys and values are in the cache
    limit: int = sys.maxsize  # tokens at which it ends
    guesses: Guesses = field(default_factory=Guesses)
    soft: dict[int, Tensor] = field(default_factory=dict)  # soft tokens by first position
    started: bool = False
    cached: int = 0  # tokens of the prompt whose keys and values were there already
    scored: bool = False  # every position's logits are wanted, not the last one's alone
    salt: bytes = b""  # sequences of different salts share no pages
    _marks: tuple[Mark, ...] | None = None

    @property
    def decoding(self) -> bool:
        return len(self.tokens) - self.computed == 1

    def name_pages(self, stop: int) -> None:
        """Give names to the whole pages before token `stop`."""
        if self._marks is None:
            self._marks = marks(self.media)  # before they are encoded and let go
        names = self.table.names
        for page in range(len(names), stop // PAGE):
            names.append(self._name(page * PAGE, (page + 1) * PAGE))

    def name_cut_page(self) -> Named | None:
        """The name of what is computed of the page behind the whole ones, if anything is."""
        self.name_pages(self.computed)
        first = self.computed // PAGE * PAGE
        return self._name(first, self.computed) if first < self.computed else None

    def text(self, first: int, last: int) -> list[int]:
        """The tokens from `first` on, as far as `last` or to the first that is of a medium."""
        assert self._marks is not None
        reached = [mark.first for mark in self._marks if mark.first < last and first < mark.last]
        return self.tokens[first : max(first, min([last, *reached]))]

    def before(self, page: int) -> Name:
        """The name of what stands before a page."""
        return self.table.names[page - 1].name if page else root(self.salt)

    def _name(self, first: int, last: int) -> Named:
        assert self._marks is not None
        return name_page(self.before(first // PAGE), self.tokens, first, last, self._marks)

    def chunk(self, room: int) -> Chunk:
        """The next `room` positions; more, or fewer, where a picture must stay whole."""
        known = len(self.tokens) + len(self.guesses.tokens)
        start, stop = self.computed, min(known, self.computed + room)
        for first, last in self.whole:
            if first < stop < last:
                stop = last if first <= start else first
        inside = tuple(span for span in self.whole if start <= span[0] < stop)
        return Chunk(self.table, start, stop, inside)


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's part of a step."""

    sequence: TokenSequence
    chunk: Chunk

    @property
    def complete(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one can be drawn."""
        return self.chunk.stop >= len(self.sequence.tokens)

    @property
    def rows(self) -> int:
        """How many of its positions, the last of the chunk, logits are wanted of."""
        if self.sequence.scored:
            return self.chunk.stop - self.chunk.start
        return 1 + len(self.sequence.guesses.tokens) if self.complete else 0


class Scheduler:
    """Holds the waiting and the running sequences, in order of arrival."""

    def __init__(
        self, cache: PagedCache, prefill_chunk: int, guesser: Guesser | None = None
    ) -> None:
        self.cache = cache
        self.prefill_chunk = prefill_chunk
        self.guesser = guesser or Guesser(0)
        self.waiting: deque[TokenSequence] = deque()
        self.running: list[TokenSequence] = []
        self.preemptions = 0
        self.prefix_queries = 0  # tokens looked up among what the cache holds
        self.prefix_hits = 0  # and found there

    def add(self, sequence: TokenSequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: TokenSequence) -> None:
        """Forget a sequence that ended, failed or was cancelled, and give its pages back."""
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step; empty only if there is nothing to do."""
        step: list[Scheduled] = []
        room = self.prefill_chunk
        decoding = [s for s in self.running if s.decoding]
        self.guesser(decoding)
        for sequence in decoding:
            if sequence in self.running:  # it may have given its pages to an earlier one
                self._schedule(sequence, 1, step)
        for sequence in [s for s in self.running if not s.decoding]:
            if room > 0 and sequence in self.running:
                room -= self._schedule(sequence, room, step)
        step = [s for s in step if s.sequence in self.running]
        while room > 0 and self._may_admit():
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            self._adopt(sequence)
            taken = self._schedule(sequence, room, step)
            if not taken:
                break
            room -= taken
        assert step or not self.waiting, "a sequence that is alone must fit"
        return [self._with_guesses(scheduled) for scheduled in step]

    def _schedule(self, sequence: TokenSequence, room: int, step: list[Scheduled]) -> int:
        """Add up to `room` positions of `sequence`, and return how many.

        0 if it had to make place for those before it. The last of the running gives way first.
        """
        chunk = sequence.chunk(room)
        sequence.name_pages(min(chunk.stop, len(sequence.tokens)))
        while not self.cache.reserve(chunk):
            loser = self.running[-1]
            self._preempt(loser)
            if loser is sequence:
                return 0
        step.append(Scheduled(sequence, chunk))
        return chunk.stop - chunk.start

    def _with_guesses(self, scheduled: Scheduled) -> Scheduled:
        """What is guessed follows, if pages are left: nobody makes place for what may be wrong."""
        sequence = scheduled.sequence
        if not sequence.guesses.tokens:
            return scheduled
        chunk = sequence.chunk(1 + len(sequence.guesses.tokens))
        if self.cache.reserve(chunk):
            return Scheduled(sequence, chunk)
        sequence.guesses.tokens = []
        return scheduled

    def _adopt(self, sequence: TokenSequence) -> None:
        """Begin behind what the cache holds of the sequence already; its last token is computed."""
        if sequence.scored:
            return
        length = len(sequence.tokens)
        sequence.name_pages(length)
        adopted = self.cache.adopt(sequence.table, (length - 1) // PAGE, sequence.whole)
        first = adopted * PAGE
        more = sequence.text(first, min(first + PAGE, length - 1))
        sequence.computed = first + self.cache.borrow(
            sequence.table, sequence.before(adopted), more
        )
        self.prefix_queries += length
        self.prefix_hits += sequence.computed
        if not sequence.started:
            sequence.started = True
            sequence.cached = sequence.computed

    def _preempt(self, sequence: TokenSequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        sequence.computed = 0
        sequence.guesses.tokens = []
        self.waiting.appendleft(sequence)

    def _release(self, sequence: TokenSequence) -> None:
        """Give pages back, named as far as they are computed."""
        cut = sequence.name_cut_page()
        self.cache.settle(sequence.table, sequence.computed)
        self.cache.release(sequence.table, cut)

    def _may_admit(self) -> bool:
        """Whether the first in line fits beside the running, with a page for each to grow."""
        if not self.waiting or len(self.running) >= self.cache.plan.max_batch:
            return False
        pages = -(-len(self.waiting[0].tokens) // PAGE) + len(self.running)
        return not self.running or all(
            free >= pages
            for group, free in zip(self.cache.plan.groups, self.cache.free_pages(), strict=True)
            if group.window is None
        )
