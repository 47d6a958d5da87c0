"""One request at work: what it may and did ask for, what it has said, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cabochon.engine.guide import Guide
from cabochon.engine.prediction import Prediction, Whole
from cabochon.engine.reader import Read, Reader
from cabochon.engine.request import Delta, FinishReason, SamplingParams, TokenLogprob
from cabochon.engine.sampler import Sampling, logprob, sample
from cabochon.engine.scheduler import TokenSequence
from cabochon.engine.stats import Timeline
from cabochon.errors import BusyError

Sink = Callable[[Delta], None]

LONGEST_WAIT = 60  # seconds after which a client that was turned away may well try again


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests may ask of an engine that serves many; None: as much as they like."""

    waiting_tokens: int | None = None  # of all prompts that wait
    seconds: float | None = None  # from a request's arrival to its last token

    def check_room(self, tokens: int, waiting: int, per_second: float) -> None:
        """Let a prompt of `tokens` wait beside those that do, or refuse it; alone it always may.

        Raises:
            BusyError: too many wait already; `per_second` are done, which says until when.
        """
        most = self.waiting_tokens
        if most is not None and waiting and waiting + tokens > most:
            seconds = round(waiting / (per_second or waiting))
            raise BusyError(
                f"{waiting:,} tokens of prompts wait already, and {most:,} may; try again later",
                min(max(1, seconds), LONGEST_WAIT),
            )


@dataclass(slots=True, eq=False)
class Work:
    """What the engine knows of a request beside its tokens."""

    sequence: TokenSequence
    params: SamplingParams
    sink: Sink
    sampling: Sampling
    reader: Reader
    guide: Guide | None
    prompt_length: int
    scores: list[TokenLogprob] = field(default_factory=list)  # of the prompt, but its first token
    timeline: Timeline = field(default_factory=Timeline)

    def take(self, token: int, ends: frozenset[int]) -> tuple[list[Read], FinishReason | None]:
        """What `token`, the last of the sequence, makes certain, and whether it ends the answer."""
        params, reads = self.params, []
        reason: FinishReason | None = None
        if token in params.stop_token_ids or (token in ends and not params.ignore_eos):
            reason = "stop"
        else:
            reads.append(self.reader.push(token))
            if reads[0].stop is not None:
                return reads, "stop"
            if self.guide and self.guide.ended:
                reason = "stop"
            elif len(self.sequence.tokens) >= self.sequence.limit:
                reason = "length"
        if reason:
            reads.append(self.reader.finish())
        return reads, "stop" if reads and reads[-1].stop is not None else reason

    def delta(
        self,
        token: int,
        reads: Sequence[Read],
        reason: FinishReason | None,
        logprobs: tuple[TokenLogprob, ...],
    ) -> Delta:
        """What `token` added to the answer, of all that was read of it."""
        return Delta(
            tokens=(token,),
            text="".join(read.text for read in reads),
            finish_reason=reason,
            reasoning="".join(read.reasoning for read in reads),
            calls=tuple(call for read in reads for call in read.calls),
            broken_call=any(read.broken_call for read in reads),
            stop=next((read.stop for read in reads if read.stop is not None), None),
            logprobs=logprobs,
            prompt_logprobs=self._told(),
            reasoning_tokens=sum(read.thoughts for read in reads),
            cached_tokens=self.sequence.cached,
        )

    def _told(self) -> tuple[TokenLogprob, ...] | None:
        """The probabilities of the prompt's tokens, once."""
        if self.params.prompt_logprobs is None or self.sequence.scored:
            return None
        scores, self.scores = tuple(self.scores), []
        return scores or None

    @property
    def few(self) -> bool:
        """Whether the likeliest tokens are all that the next draw needs to know of."""
        told = self.params.logprobs is not None or self.sequence.scored
        return not told and self.sampling.count is not None

    def forced(self) -> list[int]:
        """Tokens that must come next, if the answer's rules leave no choice."""
        return self.guide.forced(self.reader.state) if self.guide else []

    def draw(self, row: Prediction, never: Sequence[int]) -> tuple[int, tuple[TokenLogprob, ...]]:
        """The next token of the answer, and its probability if it is text and that is asked for."""
        state, asked = self.reader.state, self.params.logprobs
        allowed = self.guide.allowed(state) if self.guide else None
        choices = row.choices(self.sampling.count or 0, never, allowed)
        token = sample(choices, self.sampling)
        if self.guide:
            self.guide.take(token, state)
        if asked is None or not self.reader.is_text(token):
            return token, ()
        assert isinstance(row, Whole)
        return token, (logprob(row.logits, token, asked),)
