"""From the bytes of a body to a `ChatRequest`, or to an error that names the field.

Nothing a client sends is ignored in silence. A field is served (`ChatRequest`), known and not
served (`_NOT_SERVED`: refused unless its value asks for nothing), without effect by its meaning
(`_NO_EFFECT`), or unknown, which is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from cabochon.errors import RequestError
from cabochon.serve.protocol import ChatRequest

Neutral = tuple[Any, ...]  # values that ask for nothing; None, which is absence, always is one

_NOT_SERVED: Mapping[str, Neutral] = {
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Labels of a request, and permissions for what never happens here: they change no answer.
_NO_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "user",
    }
)
_MESSAGE_NOT_SERVED: Mapping[str, Neutral] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),  # the chat template has no place for it
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
_ROLES_NOT_SERVED = ("tool", "function")
_PARTS_NOT_SERVED = ("audio_url", "file", "refusal")


def parse_request(body: bytes) -> ChatRequest:
    """The request in `body`.

    Raises:
        RequestError: no JSON object, a field that is unknown or not served, a value out of range.
    """
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise RequestError("the body is JSON, but not an object")
    fields = _served_fields(raw)
    if isinstance(raw.get("messages"), list):
        fields["messages"] = [_served_message(m, i) for i, m in enumerate(raw["messages"])]
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _as_request_error(error) from None
    _check_together(request)
    return request


def _served_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in raw.items():
        if name in _NOT_SERVED:
            _refuse_unless(_NOT_SERVED[name], value, name)
        elif name not in ChatRequest.model_fields and name not in _NO_EFFECT:
            known = [*ChatRequest.model_fields, *_NOT_SERVED, *_NO_EFFECT]
            close = get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RequestError(f"unknown field {_short(name)!r}{hint}", _short(name))
    return {name: value for name, value in raw.items() if name in ChatRequest.model_fields}


def _served_message(message: Any, index: int) -> Any:
    """`message` without the fields that ask for nothing; what is malformed is left to the model."""
    if not isinstance(message, dict):
        return message
    where = f"messages[{index}]"
    for name, neutral in _MESSAGE_NOT_SERVED.items():
        _refuse_unless(neutral, message.get(name), f"{where}.{name}")
    if message.get("role") in _ROLES_NOT_SERVED:
        raise RequestError(
            f"role {message['role']!r} is not supported: this version calls no tools",
            f"{where}.role",
        )
    content = message.get("content")
    for i, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and part.get("type") in _PARTS_NOT_SERVED:
            raise RequestError(
                f"parts of type {part['type']!r} are not supported; send 'text', 'image_url',"
                " 'input_audio' and 'video_url'",
                f"{where}.content[{i}].type",
            )
    return {name: value for name, value in message.items() if name not in _MESSAGE_NOT_SERVED}


def _refuse_unless(neutral: Neutral, value: Any, name: str) -> None:
    # 1 == True in Python, but not in JSON
    if value is None or any(type(value) is type(n) and value == n for n in neutral):
        return
    remedy = " or ".join(["leave it out", *(f"send {n!r}" for n in neutral)])
    raise RequestError(f"{name!r} with this value is not supported: {remedy}", name)


def _check_together(request: ChatRequest) -> None:
    if len({request.max_tokens, request.max_completion_tokens} - {None}) > 1:
        raise RequestError(
            "max_tokens and max_completion_tokens differ; send one of them", "max_completion_tokens"
        )
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream to be true", "stream_options")


def _as_request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    where = ""
    for step in first["loc"]:
        if isinstance(step, int):
            where += f"[{step}]"
        elif not step.startswith("<"):
            where += f".{_short(step)}" if where else _short(step)
    if first["type"] == "extra_forbidden":
        return RequestError(f"unknown field {where!r}", where)
    if first["type"] == "missing":
        return RequestError(f"{where} is missing", where)
    return RequestError(f"{where}: {first['msg']}", where)


def _short(name: str) -> str:
    """A client's own field name, at a length fit for an error."""
    return name if len(name) <= 64 else f"{name[:64]}…"
