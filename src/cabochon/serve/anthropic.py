"""Anthropic's `/v1/messages`: a turn as blocks, and its events; errors in Anthropic's shape."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from cabochon.engine.request import Delta
from cabochon.errors import CabochonError, RequestError
from cabochon.serve.anthropic_requests import (
    AnthropicRequest,
    in_anthropic_words,
    parse_anthropic,
)
from cabochon.serve.bridge import Deltas
from cabochon.serve.errors import describe, error_response
from cabochon.serve.service import Job, Service
from cabochon.serve.spoken import Spoken, checked, new_id
from cabochon.serve.turns import turn_params, turn_prompt

Json = dict[str, Any]
MOST_DIGITS = 300  # of an integer; Python reads no more than 4,300

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def message_job(service: Service, body: bytes) -> Job:
    """What a body asks for.

    Raises:
        CabochonError: it is refused.
    """
    asked, chat = parse_anthropic(body)
    service.check_model(asked.model)
    try:
        (params,) = turn_params(chat, service.llm)
        prompt = turn_prompt(chat, service.llm, service.fetch)
    except RequestError as error:
        raise in_anthropic_words(error) from None
    answer = MessageAnswer(asked, len(prompt.tokens))
    return Job([(prompt, params)], answer, bool(asked.stream))


def counted(service: Service, body: bytes) -> Json:
    """How many tokens the prompt of a message has.

    Raises:
        CabochonError: it would be refused.
    """
    asked, chat = parse_anthropic(body, count=True)
    service.check_model(asked.model)
    try:
        return {"input_tokens": len(turn_prompt(chat, service.llm, service.fetch).tokens)}
    except RequestError as error:
        raise in_anthropic_words(error) from None


async def in_anthropic_shape(answer: Awaitable[Response]) -> Response:
    """`answer`, or its error as Anthropic's clients read it."""
    try:
        return await answer
    except CabochonError as error:
        headers = dict(error_response(error).headers)
        kept = {name: headers[name] for name in ("retry-after",) if name in headers}
        return JSONResponse(_error(error), status_code=error.http_status, headers=kept)


def _error(error: CabochonError) -> Json:
    kind = _KINDS.get(error.http_status, "api_error")
    told = describe(error)["error"]
    message = f"{told['param']}: {told['message']}" if told["param"] else told["message"]
    return {"type": "error", "error": {"type": kind, "message": message}}


class Blocks:
    """The blocks of a message as they grow, and the events that tell of it."""

    def __init__(self) -> None:
        self.content: list[Json] = []
        self._open = False  # the last block still grows

    def add(self, delta: Delta) -> list[Json]:
        events: list[Json] = []
        if delta.reasoning:
            events += self._grow("thinking", "thinking", delta.reasoning)
        if delta.text:
            events += self._grow("text", "text", delta.text)
        for call in delta.calls:
            block = {"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": {}}
            events += self._start(block)
            events.append(self._delta(type="input_json_delta", partial_json=call.arguments))
            block["input"] = _input(call.arguments)
            events += self._stop()
        if delta.finish_reason is not None:
            if not self.content:
                events += self._start({"type": "text", "text": ""})
            events += self._stop()
        return events

    def _grow(self, kind: str, key: str, text: str) -> list[Json]:
        events: list[Json] = []
        if not self._open or self.content[-1]["type"] != kind:
            more = {"signature": ""} if kind == "thinking" else {}
            events = self._start({"type": kind, key: "", **more})
        self.content[-1][key] += text
        return [*events, self._delta(type=f"{kind}_delta", **{key: text})]

    def _start(self, block: Json) -> list[Json]:
        events = self._stop()
        self.content.append(block)
        self._open = True
        index = len(self.content) - 1
        return [
            *events,
            {"type": "content_block_start", "index": index, "content_block": {**block}},
        ]

    def _stop(self) -> list[Json]:
        if not self._open:
            return []
        self._open = False
        return [{"type": "content_block_stop", "index": len(self.content) - 1}]

    def _delta(self, **delta: Any) -> Json:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def _input(arguments: str) -> Json:
    """The arguments of a call. What no number here can hold is the text that was written."""

    def real(text: str) -> float | str:
        value = float(text)
        return value if math.isfinite(value) else text

    def whole(text: str) -> int | str:
        return int(text) if len(text) <= MOST_DIGITS else text

    read: Json = json.loads(arguments, parse_float=real, parse_int=whole)
    return read


class MessageAnswer:
    """The answer to one request while it is made."""

    def __init__(self, asked: AnthropicRequest, prompt_tokens: int) -> None:
        self._model = asked.model
        self._prompt_tokens = prompt_tokens
        self._blocks = Blocks()
        self._spoken = Spoken()
        self._id = new_id("msg_")

    async def collect(self, deltas: Deltas) -> Callable[[], Json]:
        """What makes the whole message, once it is complete.

        Raises:
            CabochonError: the engine could not finish it.
            ClientDisconnect: the deltas were closed before the last one.
        """
        async for _, delta in checked(deltas):
            self._blocks.add(delta)
            self._spoken.add(delta)
        if self._spoken.finish is None:
            raise ClientDisconnect
        return partial(self._message, self._blocks.content, self._ending())

    async def events(self, deltas: Deltas) -> AsyncIterator[str]:
        """The message as server-sent events; the last one is `message_stop` or an error."""
        begun = False
        try:
            async for _, delta in checked(deltas):
                events = self._blocks.add(delta)
                self._spoken.add(delta)
                if not begun:
                    begun = True
                    none: Json = {"stop_reason": None, "stop_sequence": None}
                    yield _event({"type": "message_start", "message": self._message([], none)})
                for event in events:
                    yield _event(event)
        except CabochonError as error:
            yield _event(_error(error))
            return
        if self._spoken.finish is not None:
            usage = {"output_tokens": self._spoken.tally.tokens}
            yield _event({"type": "message_delta", "delta": self._ending(), "usage": usage})
            yield _event({"type": "message_stop"})

    def _ending(self) -> Json:
        spoken = self._spoken
        reason = "max_tokens" if spoken.finish == "length" else "end_turn"
        if spoken.called:
            reason = "tool_use"
        elif spoken.stop is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": spoken.stop}

    def _message(self, content: list[Json], ending: Json) -> Json:
        tally = self._spoken.tally
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            **ending,
            "usage": {
                "input_tokens": self._prompt_tokens - tally.cached,
                "output_tokens": tally.tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": tally.cached,
            },
        }


def _event(event: Json) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
