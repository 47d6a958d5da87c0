"""What the runs of a request have said so far, whatever shape the answer has."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect

from cabochon.engine.request import Delta, FinishReason, TokenLogprob
from cabochon.serve.bridge import Deltas
from cabochon.serve.shapes import CompletionDetails, PromptDetails, Usage
from cabochon.text.calls import ToolCall


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex[:24]}"


@dataclass(slots=True)
class Tally:
    """Tokens of one run."""

    tokens: int = 0
    reasoning: int = 0
    cached: int = 0

    def add(self, delta: Delta) -> None:
        self.tokens += len(delta.tokens)
        self.reasoning += delta.reasoning_tokens
        self.cached = max(self.cached, delta.cached_tokens)


@dataclass(slots=True)
class Spoken:
    """One run's whole answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    broken_call: bool = False
    finish: FinishReason | None = None
    stop: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    tokens: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.calls += delta.calls
        self.broken_call |= delta.broken_call
        self.finish = delta.finish_reason
        self.stop = delta.stop or self.stop
        self.logprobs += delta.logprobs
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.tokens += delta.tokens
        self.tally.add(delta)

    @property
    def called(self) -> bool:
        """Whether the answer is calls to be made: not if one of them could not be read."""
        return bool(self.calls) and not self.broken_call and self.finish == "stop"


async def checked(deltas: Deltas) -> AsyncIterator[tuple[int, Delta]]:
    """`deltas`, but that their error is raised.

    Raises:
        CabochonError: a run failed.
    """
    async for index, delta in deltas:
        if delta.error is not None:
            raise delta.error
        yield index, delta


async def listen(deltas: Deltas, runs: int) -> list[Spoken]:
    """What each of the runs says, when all have ended.

    Raises:
        CabochonError: one of them failed.
        ClientDisconnect: the deltas were closed before the last one.
    """
    spoken = [Spoken() for _ in range(runs)]
    async for index, delta in checked(deltas):
        spoken[index].add(delta)
    if any(one.finish is None for one in spoken):
        raise ClientDisconnect
    return spoken


def usage(prompts: int, tallies: list[Tally], choices: int) -> Usage:
    """OpenAI's account of `prompts` tokens; a prompt with several `choices` is counted once."""
    groups = [tallies[i : i + choices] for i in range(0, len(tallies), choices)]
    completion = sum(tally.tokens for tally in tallies)
    return Usage(
        prompt_tokens=prompts,
        completion_tokens=completion,
        total_tokens=prompts + completion,
        prompt_tokens_details=PromptDetails(
            cached_tokens=sum(min(tally.cached for tally in group) for group in groups)
        ),
        completion_tokens_details=CompletionDetails(
            reasoning_tokens=sum(tally.reasoning for tally in tallies)
        ),
    )
