"""`/v1/responses`: OpenAI's newer shape of a turn, as items, and its events."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect

from cabochon.engine.request import Delta
from cabochon.errors import CabochonError, RequestError
from cabochon.serve.bridge import Deltas
from cabochon.serve.errors import describe
from cabochon.serve.response_requests import ResponseRequest, in_response_words, parse_response
from cabochon.serve.service import Job, Service
from cabochon.serve.spoken import Tally, checked, new_id
from cabochon.serve.turns import turn_params, turn_prompt

Json = dict[str, Any]


def response_job(service: Service, body: bytes) -> Job:
    """What a body asks for.

    Raises:
        CabochonError: it is refused.
    """
    asked, chat = parse_response(body)
    service.check_model(asked.model)
    try:
        (params,) = turn_params(chat, service.llm)
        prompt = turn_prompt(chat, service.llm, service.fetch)
    except RequestError as error:
        raise in_response_words(error) from None
    answer = ResponseAnswer(asked, len(prompt.tokens))
    return Job([(prompt, params)], answer, bool(asked.stream))


class Items:
    """The items of a response as they grow, and the events that tell of it."""

    def __init__(self) -> None:
        self.output: list[Json] = []
        self._open: Json | None = None  # the item that still grows

    def add(self, delta: Delta) -> list[Json]:
        events: list[Json] = []
        if delta.reasoning:
            events += self._grow("reasoning", delta.reasoning)
        if delta.text:
            events += self._grow("message", delta.text)
        for call in delta.calls:
            events += self._close()
            events += self._call(call.name, call.arguments)
        if delta.finish_reason is not None:
            if not self.output:  # a turn without a word is a message without text
                events += self._start("message")
            events += self._close("incomplete" if delta.finish_reason == "length" else "completed")
        return events

    def _grow(self, kind: str, text: str) -> list[Json]:
        events = [] if self._open and self._open["type"] == kind else self._close()
        if self._open is None:
            events += self._start(kind)
        item = self._open
        assert item is not None
        item["content"][0]["text"] += text
        more: Json = {"logprobs": []} if kind == "message" else {}
        return [
            *events,
            self._event(f"{_text_kind(kind)}.delta", content_index=0, delta=text, **more),
        ]

    def _start(self, kind: str) -> list[Json]:
        if kind == "message":
            part: Json = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item: Json = {
                "id": new_id("msg_"), "type": kind, "role": "assistant", "status": "in_progress",
                "content": [],
            }  # fmt: skip
        else:
            part = {"type": "reasoning_text", "text": ""}
            item = {
                "id": new_id("rs_"), "type": kind, "status": "in_progress", "summary": [],
                "content": [],
            }  # fmt: skip
        self.output.append(item)
        added = self._added(item)
        item["content"].append(part)
        self._open = item
        return [
            added,
            self._event("response.content_part.added", content_index=0, part=dict(part)),
        ]

    def _close(self, status: str = "completed") -> list[Json]:
        item, kind = self._open, self._open["type"] if self._open else ""
        if item is None:
            return []
        part = item["content"][0]
        more: Json = {"logprobs": []} if kind == "message" else {}
        item["status"] = status
        events = [
            self._event(f"{_text_kind(kind)}.done", content_index=0, text=part["text"], **more),
            self._event("response.content_part.done", content_index=0, part=dict(part)),
            self._done(item),
        ]
        self._open = None
        return events

    def _call(self, name: str, arguments: str) -> list[Json]:
        item: Json = {
            "id": new_id("fc_"), "type": "function_call", "call_id": new_id("call_"), "name": name,
            "arguments": "", "status": "in_progress",
        }  # fmt: skip
        self.output.append(item)
        events = [self._added(item)]
        item["arguments"], item["status"] = arguments, "completed"
        told = "response.function_call_arguments"
        return [
            *events,
            self._event(f"{told}.delta", delta=arguments),
            self._event(f"{told}.done", name=name, arguments=arguments),
            self._done(item),
        ]

    def _event(self, kind: str, **fields: Any) -> Json:
        """An event of the last item."""
        place = {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}
        return {"type": kind, **place, **fields}

    def _added(self, item: Json) -> Json:
        index = len(self.output) - 1
        return {"type": "response.output_item.added", "output_index": index, "item": _copy(item)}

    def _done(self, item: Json) -> Json:
        index = len(self.output) - 1
        return {"type": "response.output_item.done", "output_index": index, "item": _copy(item)}


class ResponseAnswer:
    """The answer to one request while it is made."""

    def __init__(self, asked: ResponseRequest, prompt_tokens: int) -> None:
        self._asked = asked
        self._prompt_tokens = prompt_tokens
        self._items = Items()
        self._tally = Tally()
        self._id = new_id("resp_")
        self._created = int(time.time())

    async def collect(self, deltas: Deltas) -> Callable[[], Json]:
        """What makes the whole response, once it is complete.

        Raises:
            CabochonError: the engine could not finish it.
            ClientDisconnect: the deltas were closed before the last one.
        """
        async for _, delta in checked(deltas):
            self._items.add(delta)
            self._tally.add(delta)
            if delta.finish_reason is not None:
                return partial(self._response, _status(delta))
        raise ClientDisconnect

    async def events(self, deltas: Deltas) -> AsyncIterator[str]:
        """The response as server-sent events; the last one says how it ended."""
        number = 0

        def told(event: Json) -> str:
            nonlocal number
            text = json.dumps({**event, "sequence_number": number}, ensure_ascii=False)
            number += 1
            return f"event: {event['type']}\ndata: {text}\n\n"

        for kind in ("response.created", "response.in_progress"):
            yield told({"type": kind, "response": self._response("in_progress")})
        try:
            async for _, delta in checked(deltas):
                self._tally.add(delta)
                for event in self._items.add(delta):
                    yield told(event)
                if delta.finish_reason is not None:
                    status = _status(delta)
                    yield told({"type": f"response.{status}", "response": self._response(status)})
        except CabochonError as error:
            failed = {**self._response("failed"), "error": _error(error)}
            yield told({"type": "response.failed", "response": failed})

    def _response(self, status: str) -> Json:
        asked = self._asked
        reasoning = asked.reasoning
        tools = [
            {
                "description": None,
                "parameters": None,
                **tool.model_dump(),
                "strict": bool(tool.strict),
            }
            for tool in asked.tools or ()
        ]
        choice: Any = asked.tool_choice or "auto"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if status == "incomplete"
            else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": asked.model,
            "output": [_copy(item) for item in self._items.output],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": _format(asked)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": tools,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "metadata": asked.metadata or {},
            **({"usage": self._usage()} if status in ("completed", "incomplete") else {}),
        }

    def _usage(self) -> Json:
        tally, prompt = self._tally, self._prompt_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": tally.cached, "cache_write_tokens": 0},
            "output_tokens": tally.tokens,
            "output_tokens_details": {"reasoning_tokens": tally.reasoning},
            "total_tokens": prompt + tally.tokens,
        }


def _copy(item: Json) -> Json:
    """`item` as it is now: it grows while its events wait to be sent."""
    copied: Json = json.loads(json.dumps(item))
    return copied


def _text_kind(kind: str) -> str:
    return "response.output_text" if kind == "message" else "response.reasoning_text"


def _status(delta: Delta) -> str:
    return "incomplete" if delta.finish_reason == "length" else "completed"


def _error(error: CabochonError) -> Json:
    return {"code": "server_error", "message": describe(error)["error"]["message"]}


def _format(asked: ResponseRequest) -> Json:
    given = asked.text.format if asked.text else None
    return given.model_dump(by_alias=True, exclude_none=True) if given else {"type": "text"}
