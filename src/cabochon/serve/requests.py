"""From the bytes of a body to a request, or to an error that names the field.

Nothing a client sends is ignored in silence. A field is served (it is of the model), known and not
served (refused unless its value asks for nothing), without effect by its meaning, or unknown, which
is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from cabochon.errors import RequestError
from cabochon.serve.protocol import ChatRequest

# Reading JSON lets no other thread run. Half a million keys take a third of a second; a prompt that
# fits a context has fewer commas and colons, whatever it is made of.
MAX_SEPARATORS = 2**20

Neutral = tuple[Any, ...]  # values that ask for nothing; None, which is absence, always is one
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Fields:
    """What an endpoint knows of fields that its model does not have."""

    not_served: Mapping[str, Neutral]
    no_effect: Set[str] = frozenset()


# Labels of a request: they change no answer.
LABELS = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user"}
)
_CHAT = Fields(
    not_served={
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "verbosity": ("medium",),
        "web_search_options": (),
    },
    no_effect=LABELS,
)
_MESSAGE_NOT_SERVED: Mapping[str, Neutral] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_PARTS_NOT_SERVED = ("audio_url", "file", "refusal")


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises:
        RequestError: there is none, or one of too many parts.
    """
    if body.count(b",") + body.count(b":") > MAX_SEPARATORS:
        raise RequestError(f"the body has more than {MAX_SEPARATORS:,} commas and colons")
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise RequestError("the body is JSON, but not an object")
    return raw


def parse(raw: Mapping[str, Any], model: type[Model], known: Fields) -> Model:
    """The request in `raw`.

    Raises:
        RequestError: a field that is unknown or not served, or a value out of range.
    """
    served = {
        name for n, f in model.model_fields.items() for name in (n, f.alias) if name is not None
    }
    fields = _served_fields(raw, served, known)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise as_request_error(error) from None


def parse_chat(body: bytes) -> ChatRequest:
    """The chat completion that `body` asks for.

    Raises:
        RequestError: no JSON object, a field that is unknown or not served, a value out of range.
    """
    raw = parse_json(body)
    if isinstance(raw.get("messages"), list):
        raw["messages"] = [_served_message(m, i) for i, m in enumerate(raw["messages"])]
    request = parse(raw, ChatRequest, _CHAT)
    _check_together(request)
    return request


def check_stream(stream: bool | None, options: object) -> None:
    if options is not None and not stream:
        raise RequestError("stream_options needs stream to be true", "stream_options")


def _served_fields(raw: Mapping[str, Any], served: Set[str], known: Fields) -> dict[str, Any]:
    for name, value in raw.items():
        if name in known.not_served:
            refuse_unless(known.not_served[name], value, name)
        elif name not in served and name not in known.no_effect:
            names = [*served, *known.not_served, *known.no_effect]
            close = get_close_matches(name, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RequestError(f"unknown field {_short(name)!r}{hint}", _short(name))
    return {name: value for name, value in raw.items() if name in served}


def _served_message(message: Any, index: int) -> Any:
    """`message` without the fields that ask for nothing; what is malformed is left to the model."""
    if not isinstance(message, dict):
        return message
    where = f"messages[{index}]"
    for name, neutral in _MESSAGE_NOT_SERVED.items():
        refuse_unless(neutral, message.get(name), f"{where}.{name}")
    role = message.get("role")
    if role not in _ROLES:
        raise RequestError(
            f"role is {str(role)[:64]!r}, expected one of {', '.join(_ROLES)}", f"{where}.role"
        )
    if role != "tool":  # the chat template has no place for the name of a person
        refuse_unless((), message.get("name"), f"{where}.name")
        message = {name: value for name, value in message.items() if name != "name"}
    if role != "assistant":
        refuse_unless(([],), message.get("tool_calls"), f"{where}.tool_calls")
        message = {name: value for name, value in message.items() if name != "tool_calls"}
    content = message.get("content")
    for i, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, dict) and part.get("type") in _PARTS_NOT_SERVED:
            raise RequestError(
                f"parts of type {part['type']!r} are not supported; send 'text', 'image_url',"
                " 'input_audio' and 'video_url'",
                f"{where}.content[{i}].type",
            )
    return {name: value for name, value in message.items() if name not in _MESSAGE_NOT_SERVED}


def refuse_unless(neutral: Neutral, value: Any, name: str) -> None:
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
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    check_stream(request.stream, request.stream_options)


def as_request_error(error: ValidationError) -> RequestError:
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
    return RequestError(f"{where}: {first['msg'][:300]}", where)


def _short(name: str) -> str:
    """A client's own field name, at a length fit for an error."""
    return name if len(name) <= 64 else f"{name[:64]}…"
