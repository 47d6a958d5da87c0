"""What the engine says about a chat, in OpenAI's shapes: one answer, or server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from cabochon.engine.request import Delta, TokenLogprob
from cabochon.errors import CabochonError
from cabochon.serve.bridge import Deltas
from cabochon.serve.errors import describe
from cabochon.serve.protocol import ChatRequest
from cabochon.serve.shapes import (
    AnswerMessage,
    Called,
    CalledDelta,
    CalledFunction,
    ChatChunk,
    ChatCompletion,
    ChatFinish,
    Choice,
    ChunkChoice,
    ChunkDelta,
    ContentLogprob,
    Logprobs,
    TopLogprob,
    Usage,
)
from cabochon.serve.spoken import Spoken, checked, listen, new_id, usage
from cabochon.text.calls import ToolCall
from cabochon.text.tokenizer import Tokenizer


class ChatAnswer:
    """The answer to one chat while it is made."""

    def __init__(
        self, chat: ChatRequest, prompt_tokens: int, fingerprint: str, tokenizer: Tokenizer
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.runs = chat.n or 1
        self.with_usage = chat.with_usage
        self.with_logprobs = bool(chat.logprobs)
        self.tokenizer = tokenizer
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": chat.model,
            "system_fingerprint": fingerprint,
        }

    async def collect(self, deltas: Deltas) -> Callable[[], dict[str, Any]]:
        """What makes the whole answer, once it is complete.

        Raises:
            CabochonError: the engine could not finish it.
            ClientDisconnect: the deltas were closed before the last one.
        """
        return partial(self._completion, await listen(deltas, self.runs))

    def _completion(self, spoken: Sequence[Spoken]) -> dict[str, Any]:
        return ChatCompletion(
            **self.head,
            choices=[self._whole(i, one) for i, one in enumerate(spoken)],
            usage=self._usage(spoken),
        ).model_dump(by_alias=True)

    async def events(self, deltas: Deltas) -> AsyncIterator[str]:
        """The answer as server-sent events; the last one is `[DONE]` or an error."""
        spoken = [Spoken() for _ in range(self.runs)]
        for i in range(self.runs):
            yield self._choice(i, ChunkDelta(role="assistant", content=""))
        try:
            async for i, delta in checked(deltas):
                if delta.reasoning:
                    yield self._choice(i, ChunkDelta(reasoning_content=delta.reasoning))
                if delta.text or delta.logprobs:
                    told = self._logprobs(delta.logprobs)
                    yield self._choice(i, ChunkDelta(content=delta.text), logprobs=told)
                for call in self._called(delta, len(spoken[i].calls)):
                    yield self._choice(i, ChunkDelta(tool_calls=[call]))
                spoken[i].add(delta)
                if delta.finish_reason is not None:
                    yield self._choice(i, ChunkDelta(), _finish(spoken[i]))
        except CabochonError as error:
            yield event(json.dumps(describe(error)))
            return
        if all(one.finish is not None for one in spoken):
            if self.with_usage:
                yield self._chunk([], self._usage(spoken))
            yield event("[DONE]")

    def _called(self, delta: Delta, before: int) -> list[CalledDelta]:
        """The calls of `delta`, each whole: half of one may still turn out to be none."""
        return [
            CalledDelta(index=before + i, **_function(call).model_dump())
            for i, call in enumerate(delta.calls)
        ]

    def _whole(self, index: int, one: Spoken) -> Choice:
        content = one.text if one.text or not (one.calls or one.reasoning) else None
        message = AnswerMessage(
            content=content,
            reasoning_content=one.reasoning or None,
            tool_calls=[_function(call) for call in one.calls] or None,
        )
        return Choice(
            index=index,
            message=message,
            logprobs=self._logprobs(one.logprobs),
            finish_reason=_finish(one),
        )

    def _logprobs(self, told: Sequence[TokenLogprob]) -> Logprobs | None:
        if not self.with_logprobs:
            return None
        return Logprobs(content=[self._content_logprob(one) for one in told])

    def _content_logprob(self, told: TokenLogprob) -> ContentLogprob:
        top = [self._top(token, logprob) for token, logprob in told.top]
        return ContentLogprob(**self._top(told.token, told.logprob).model_dump(), top_logprobs=top)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        piece = self.tokenizer.piece(token)
        return TopLogprob(token=piece.decode(errors="replace"), logprob=logprob, bytes=list(piece))

    def _choice(
        self,
        index: int,
        delta: ChunkDelta,
        finish_reason: ChatFinish | None = None,
        logprobs: Logprobs | None = None,
    ) -> str:
        choice = ChunkChoice(
            index=index, delta=delta, finish_reason=finish_reason, logprobs=logprobs
        )
        return self._chunk([choice])

    def _chunk(self, choices: list[ChunkChoice], total: Usage | None = None) -> str:
        chunk = ChatChunk(**self.head, choices=choices, usage=total)
        return event(chunk.model_dump_json(exclude=None if self.with_usage else {"usage"}))

    def _usage(self, spoken: Sequence[Spoken]) -> Usage:
        return usage(self.prompt_tokens, [one.tally for one in spoken], self.runs)


def event(data: str) -> str:
    return f"data: {data}\n\n"


def _finish(one: Spoken) -> ChatFinish:
    """OpenAI's word for the end: calls are to be made only if all of them could be read."""
    assert one.finish is not None
    return "tool_calls" if one.called else one.finish


def _function(call: ToolCall) -> CalledFunction:
    return CalledFunction(
        id=new_id("call_"), function=Called(name=call.name, arguments=call.arguments)
    )
