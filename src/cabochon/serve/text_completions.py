"""`/v1/completions`: text, or token ids, continued as it stands; with `echo`, also scored.

Special tokens in a prompt's text stand by their names. Text that does not start with the beginning
of a sequence gets it, since Gemma repeats itself without; token ids are taken as they are.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, Tag

from cabochon.engine.request import MAX_LOGPROBS, FinishReason, Prompt, TokenLogprob
from cabochon.errors import CabochonError, RequestError
from cabochon.llm import LLM
from cabochon.serve.answers import event
from cabochon.serve.bridge import Deltas
from cabochon.serve.errors import describe
from cabochon.serve.fields import SamplingFields, TokenId, either, is_none
from cabochon.serve.requests import LABELS, Fields, check_stream, parse, parse_json
from cabochon.serve.service import Job, Service
from cabochon.serve.shapes import Usage
from cabochon.serve.spoken import Spoken, checked, listen, usage
from cabochon.serve.turns import check_tokens
from cabochon.text.tokenizer import Tokenizer

MAX_PROMPTS = 256
BOS = "<bos>"

_KNOWN = Fields(not_served={"suffix": ("",)}, no_effect=LABELS)


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if isinstance(first, str):
        return "<texts>"
    return "<tokens>" if isinstance(first, int) else "<rows>"


Tokens = Annotated[list[TokenId], Field(min_length=1)]
PromptField = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[Tokens, Tag("<tokens>")]
    | Annotated[list[Tokens], Field(max_length=MAX_PROMPTS), Tag("<rows>")],
    either(_prompt_kind, "a text, a row of token ids, or several of either"),
]


class CompletionRequest(SamplingFields):
    model: str = Field(min_length=1, max_length=1024)
    prompt: PromptField
    max_tokens: int | None = Field(None, ge=0, lt=2**31)  # None: 16, as OpenAI has it
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=16)


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    system_fingerprint: str
    usage: Usage | None = Field(default=None, exclude_if=is_none)


def parse_completion(body: bytes) -> CompletionRequest:
    """The completion that `body` asks for.

    Raises:
        RequestError: no JSON object, a field that is unknown or not served, a value out of range.
    """
    asked = parse(parse_json(body), CompletionRequest, _KNOWN)
    check_stream(asked.stream, asked.stream_options)
    if asked.best_of not in (None, asked.n or 1):
        raise RequestError("best_of other than n is not supported: leave it out", "best_of")
    return asked


def completion_job(service: Service, body: bytes) -> Job:
    """What a body asks for.

    Raises:
        CabochonError: it is refused.
    """
    asked, llm = parse_completion(body), service.llm
    service.check_model(asked.model)
    check_tokens(asked.logit_bias, asked.stop_token_ids, llm)
    prompts = [_prompt(one, llm) for one in _several(asked.prompt)]
    if len(prompts) * (asked.n or 1) > MAX_PROMPTS:
        raise RequestError(f"prompts times n is more than {MAX_PROMPTS}", "n")
    most = 16 if asked.max_tokens is None else asked.max_tokens
    params = asked.sampling(
        llm.defaults,
        # One token is drawn where none is wanted: the scores of the prompt come with it.
        max_tokens=max(1, most),
        logprobs=asked.logprobs,
        prompt_logprobs=asked.logprobs if asked.echo else None,
    )
    runs = [(made.prompt, one) for made in prompts for one in params]
    answer = TextAnswer(asked, prompts, most > 0, service)
    return Job(runs, answer, bool(asked.stream))


@dataclass(frozen=True, slots=True)
class _Prompt:
    prompt: Prompt
    text: str  # what `echo` gives back
    added: int  # tokens in front that the client did not write


def _several(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _prompt(prompt: str | list[int], llm: LLM) -> _Prompt:
    if isinstance(prompt, str):
        bare = not prompt.startswith(BOS)
        return _Prompt(llm.prompts.raw(BOS + prompt if bare else prompt), prompt, int(bare))
    return _Prompt(llm.prompts.raw(prompt), llm.prompts.tokenizer.spell(prompt), 0)


class TextAnswer:
    """The answer to one request while it is made."""

    def __init__(
        self,
        asked: CompletionRequest,
        prompts: Sequence[_Prompt],
        generate: bool,
        service: Service,
    ) -> None:
        self.asked = asked
        self.choices = asked.n or 1
        self.prompts = prompts
        self.generate = generate
        self.tokenizer: Tokenizer = service.llm.prompts.tokenizer
        self.head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": service.fingerprint,
        }

    async def collect(self, deltas: Deltas) -> Callable[[], dict[str, Any]]:
        """What makes the whole answer, once it is complete.

        Raises:
            CabochonError: the engine could not finish it.
            ClientDisconnect: the deltas were closed before the last one.
        """
        return partial(self._completion, await listen(deltas, len(self.prompts) * self.choices))

    def _completion(self, spoken: Sequence[Spoken]) -> dict[str, Any]:
        choices = [self._whole(i, one) for i, one in enumerate(spoken)]
        return Completion(**self.head, choices=choices, usage=self._usage(spoken)).model_dump()

    async def events(self, deltas: Deltas) -> AsyncIterator[str]:
        """The answer as server-sent events; the last one is `[DONE]` or an error."""
        spoken = [Spoken() for _ in range(len(self.prompts) * self.choices)]
        shown = [0] * len(spoken)  # characters
        try:
            async for i, delta in checked(deltas):
                part = Spoken()
                part.add(delta)
                make = partial(self._piece, i, part, shown[i], not spoken[i].tokens)
                # That of a long prompt's scores takes its time.
                length, told = await asyncio.to_thread(make) if part.prompt_logprobs else make()
                shown[i] += length
                spoken[i].add(delta)
                yield told
        except CabochonError as error:
            yield event(json.dumps(describe(error)))
            return
        if all(one.finish is not None for one in spoken):
            if self.asked.with_usage:
                yield self._chunk([], self._usage(spoken))
            yield event("[DONE]")

    def _piece(self, index: int, part: Spoken, offset: int, first: bool) -> tuple[int, str]:
        """The event of what one delta adds, and the characters of its text."""
        piece = self._whole(index, part, offset, first)
        return len(piece.text), self._chunk([piece])

    def _whole(self, index: int, one: Spoken, offset: int = 0, first: bool = True) -> TextChoice:
        """One choice; in a stream, what one delta adds to it behind `offset` characters."""
        made = self.prompts[index // self.choices]
        echo = made.text if self.asked.echo and first else ""
        text = one.text if self.generate else ""
        told = None
        if self.asked.logprobs is not None:
            told = _Table(self.tokenizer, offset)
            if self.asked.echo and first:
                told.prompt(made, one.prompt_logprobs)
            if self.generate:
                told.add(one.logprobs)
        finish = one.finish
        if finish is not None and not self.generate:
            finish = "length"
        return TextChoice(
            index=index,
            text=echo + text,
            logprobs=None if told is None else told.logprobs,
            finish_reason=finish,
        )

    def _chunk(self, choices: list[TextChoice], total: Usage | None = None) -> str:
        return event(Completion(**self.head, choices=choices, usage=total).model_dump_json())

    def _usage(self, spoken: Sequence[Spoken]) -> Usage:
        tallies = [one.tally for one in spoken]
        if not self.generate:
            tallies = [replace(tally, tokens=0) for tally in tallies]
        prompts = sum(len(made.prompt.tokens) for made in self.prompts)
        return usage(prompts, tallies, self.choices)


class _Table:
    """OpenAI's four lists of tokens, filled from the first on."""

    def __init__(self, tokenizer: Tokenizer, offset: int) -> None:
        self._tokenizer = tokenizer
        self._offset = offset
        self.logprobs = TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])

    def prompt(self, made: _Prompt, scores: Sequence[TokenLogprob]) -> None:
        """The prompt's tokens that the client wrote.

        The very first follows nothing, so the model gives it no probability. OpenAI's description
        has a number here, and 0 leaves the sum of the rest as it is.
        """
        if not made.added:
            self._row(made.prompt.tokens[0], 0.0, {})
        self.add(scores[max(0, made.added - 1) :])

    def add(self, told: Sequence[TokenLogprob]) -> None:
        for one in told:
            top = {self._text(token): logprob for token, logprob in reversed(one.top)}
            self._row(one.token, one.logprob, {**top, self._text(one.token): one.logprob})

    def _row(self, token: int, logprob: float, top: dict[str, float]) -> None:
        text = self._text(token)
        self.logprobs.tokens.append(text)
        self.logprobs.token_logprobs.append(logprob)
        self.logprobs.top_logprobs.append(top)
        self.logprobs.text_offset.append(self._offset)
        self._offset += len(text)

    def _text(self, token: int) -> str:
        return self._tokenizer.piece(token).decode(errors="replace")
