"""What the engine has done since it began, counted where it happens.

One thread writes, any other may read: a reader sees each number whole, though not all of the same
instant.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

# Seconds, and tokens. Each histogram has one more bucket, for what lies above.
_LATENCIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_INTERVALS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_LENGTHS = tuple(2**i for i in range(18))


class Histogram:
    """Counts of values by the bucket they fall into, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


def _latencies() -> Histogram:
    return Histogram(_LATENCIES)


def _lengths() -> Histogram:
    return Histogram(_LENGTHS)


@dataclass(slots=True)
class Timeline:
    """When what happened to one request, in seconds of the monotonic clock."""

    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None  # first computed on
    first: float | None = None  # first token
    latest: float | None = None  # token so far
    tokens: int = 0


@dataclass(slots=True)
class Stats:
    """Counters and histograms of one engine."""

    steps: int = 0
    busy_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    guessed: int = 0
    guessed_times: int = 0
    guessed_right_at: Counter[int] = field(default_factory=Counter)  # by place among guesses
    ended: Counter[str] = field(default_factory=Counter)  # by finish reason, "error" and "abort"
    queue: Histogram = field(default_factory=_latencies)
    first_token: Histogram = field(default_factory=_latencies)
    prefill: Histogram = field(default_factory=_latencies)
    decode: Histogram = field(default_factory=_latencies)
    whole: Histogram = field(default_factory=_latencies)
    interval: Histogram = field(default_factory=lambda: Histogram(_INTERVALS))
    prompt_length: Histogram = field(default_factory=_lengths)
    answer_length: Histogram = field(default_factory=_lengths)
    step_length: Histogram = field(default_factory=_lengths)

    @property
    def generated(self) -> int:
        """Tokens drawn for answers."""
        return sum(self.first_token.counts) + sum(self.interval.counts)

    @property
    def tokens_per_second(self) -> float:
        """Of prompts and answers together, while there was work; 0 before there was any."""
        done = self.prefill_tokens + self.decode_tokens
        return done / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def guessed_right(self) -> int:
        return self.guessed_right_at.total()

    def step(self, prefill: int, decode: int, computed: int) -> None:
        """A step has computed so many positions; those of guesses are of neither kind."""
        self.steps += 1
        self.prefill_tokens += prefill
        self.decode_tokens += decode
        self.step_length.add(computed)

    def judged(self, guessed: int, right: int) -> None:
        """Guesses that were right are tokens that need no step of their own."""
        self.guessed += guessed
        self.guessed_times += guessed > 0
        self.guessed_right_at.update(range(right))
        self.decode_tokens += right

    def start(self, timeline: Timeline, now: float) -> None:
        """A request is computed on; again after it was put off, which changes nothing here."""
        if timeline.started is None:
            timeline.started = now
            self.queue.add(now - timeline.submitted)

    def token(self, timeline: Timeline, now: float) -> None:
        if timeline.latest is None:
            timeline.first = now
            self.first_token.add(now - timeline.submitted)
        else:
            self.interval.add(now - timeline.latest)
        timeline.latest = now
        timeline.tokens += 1

    def end(self, timeline: Timeline, reason: str, prompt_tokens: int) -> None:
        """A request ended; for those that were answered, how long it took."""
        self.ended[reason] += 1
        first, last = timeline.first, timeline.latest
        if reason in ("error", "abort") or first is None or last is None:
            return
        assert timeline.started is not None
        self.prefill.add(first - timeline.started)
        self.decode.add(last - first)
        self.whole.add(last - timeline.submitted)
        self.prompt_length.add(prompt_tokens)
        self.answer_length.add(timeline.tokens)
