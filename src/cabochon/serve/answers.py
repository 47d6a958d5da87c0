"""What the engine says about a request, in OpenAI's shapes: one answer, or server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import ClientDisconnect

from cabochon.engine.request import FinishReason
from cabochon.serve.bridge import Deltas
from cabochon.serve.errors import describe
from cabochon.serve.protocol import (
    AnswerMessage,
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Choice,
    ChunkChoice,
    ChunkDelta,
    Usage,
)


class Answer:
    """The answer to one request while it is made."""

    def __init__(self, chat: ChatRequest, prompt_tokens: int, fingerprint: str) -> None:
        self.prompt_tokens = prompt_tokens
        self.with_usage = bool(chat.stream_options and chat.stream_options.include_usage)
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": chat.model,
            "system_fingerprint": fingerprint,
        }

    async def collect(self, deltas: Deltas) -> ChatCompletion:
        """The whole answer.

        Raises:
            CabochonError: the engine could not finish it.
            ClientDisconnect: the deltas were closed before the last one.
        """
        text: list[str] = []
        tokens = 0
        finish_reason: FinishReason | None = None
        async for delta in deltas:
            if delta.error is not None:
                raise delta.error
            text.append(delta.text)
            tokens += len(delta.tokens)
            finish_reason = delta.finish_reason
        if finish_reason is None:
            raise ClientDisconnect
        message = AnswerMessage(content="".join(text))
        return ChatCompletion(
            **self.head,
            choices=[Choice(message=message, finish_reason=finish_reason)],
            usage=self._usage(tokens),
        )

    async def events(self, deltas: Deltas) -> AsyncIterator[str]:
        """The answer as server-sent events; the last one is `[DONE]` or an error."""
        tokens = 0
        yield self._choice(ChunkDelta(role="assistant", content=""))
        async for delta in deltas:
            if delta.error is not None:
                yield _event(json.dumps(describe(delta.error)))
                return
            tokens += len(delta.tokens)
            if delta.text:
                yield self._choice(ChunkDelta(content=delta.text))
            if delta.finish_reason is not None:
                yield self._choice(ChunkDelta(), delta.finish_reason)
                if self.with_usage:
                    yield self._chunk([], self._usage(tokens))
                yield _event("[DONE]")

    def _choice(self, delta: ChunkDelta, finish_reason: FinishReason | None = None) -> str:
        return self._chunk([ChunkChoice(delta=delta, finish_reason=finish_reason)])

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> str:
        chunk = ChatChunk(**self.head, choices=choices, usage=usage)
        return _event(chunk.model_dump_json(exclude=None if self.with_usage else {"usage"}))

    def _usage(self, tokens: int) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=tokens,
            total_tokens=self.prompt_tokens + tokens,
        )


def _event(data: str) -> str:
    return f"data: {data}\n\n"
