"""OpenAI's messages → messages of the chat template, with media as the model takes them."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from cabochon.errors import RequestError
from cabochon.prompts import Prompts
from cabochon.serve.fields import AudioPart, ImagePart, TextPart, VideoPart
from cabochon.serve.presence import check_wanted
from cabochon.serve.protocol import (
    AssistantMessage,
    ChatMessage,
    MessageToolCall,
    SystemMessage,
    ToolMessage,
    UserMessage,
)

MOST = {ImagePart: (64, "pictures"), AudioPart: (16, "sounds"), VideoPart: (4, "videos")}


Fetch = Callable[[str], bytes]  # what is at a URL


@dataclass(frozen=True, slots=True)
class Media:
    """How media become what the model takes; None fetches nothing from elsewhere."""

    prompts: Prompts
    fetch: Fetch | None = None


def chat_messages(messages: Sequence[ChatMessage], media: Media) -> list[dict[str, Any]]:
    """`messages` as `Prompts.chat` takes them, each of their media preprocessed.

    That is done at once, one after the other, because a file decoded is much larger than what the
    model takes of it.

    Raises:
        RequestError: a medium that may not be fetched, cannot be decoded or is not for this model,
            or too many of them; results of tools that belong to no call, or calls
            without a result.
    """
    contents = [m.content for m in messages if isinstance(m.content, list)]
    for kind, (most, name) in MOST.items():
        found = sum(isinstance(part, kind) for part in chain.from_iterable(contents))
        if found > most:
            raise RequestError(
                f"{found} {name} in one request, expected at most {most}", "messages"
            )
    _check_calls(messages)
    return [_message(m, media, f"messages[{i}]") for i, m in enumerate(messages)]


def _check_calls(messages: Sequence[ChatMessage]) -> None:
    """Each result follows its call, and each call has one: templates drop what does not."""
    waiting: dict[str, str] = {}  # calls without a result, with the place of their message
    for i, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in waiting:
                raise RequestError(
                    f"{message.tool_call_id[:64]!r} is no call of the message before that waits"
                    " for a result",
                    f"messages[{i}].tool_call_id",
                )
            del waiting[message.tool_call_id]
            continue
        _refuse_waiting(waiting)
        if isinstance(message, AssistantMessage):
            waiting = {call.id: f"messages[{i}].tool_calls" for call in message.tool_calls or ()}
            if len(waiting) < len(message.tool_calls or ()):
                raise RequestError("two calls have the same id", f"messages[{i}].tool_calls")
    _refuse_waiting(waiting)


def _refuse_waiting(waiting: dict[str, str]) -> None:
    if waiting:
        id_, where = next(iter(waiting.items()))
        raise RequestError(
            f"the call {id_[:64]!r} has no result: a message of role 'tool' for each call follows",
            where,
        )


def _message(message: ChatMessage, media: Media, where: str) -> dict[str, Any]:
    match message:
        case SystemMessage():
            return {"role": "system", "content": _content(message, media, where)}
        case UserMessage():
            return {"role": "user", "content": _content(message, media, where)}
        case ToolMessage():
            content = _content(message, media, where)
            return {"role": "tool", "content": content, "tool_call_id": message.tool_call_id}
        case AssistantMessage():
            made = {"role": "assistant", "content": _content(message, media, where)}
            if message.tool_calls:
                made["tool_calls"] = [
                    _call(call, f"{where}.tool_calls[{i}]")
                    for i, call in enumerate(message.tool_calls)
                ]
            reasoning = message.reasoning_content or message.reasoning
            return {**made, "reasoning_content": reasoning} if reasoning else made


def _content(message: ChatMessage, media: Media, where: str) -> str | list[dict[str, Any]]:
    content = message.content
    if content is None or isinstance(content, str):
        return content or ""
    return [_part(part, media, f"{where}.content[{i}]") for i, part in enumerate(content)]


def _call(call: MessageToolCall, where: str) -> dict[str, Any]:
    """A call with its arguments as the template takes them, a mapping."""
    try:
        arguments = json.loads(call.function.arguments or "{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(
            "arguments is not the text of a JSON object", f"{where}.function.arguments"
        )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # though Python takes it


def _part(
    part: TextPart | ImagePart | AudioPart | VideoPart, media: Media, where: str
) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    where += f".{part.type}"
    check_wanted()
    try:
        match part:
            case ImagePart():
                data = _from_url(part.image_url.url, "image/png", media.fetch)
                return {"type": "image", "image": media.prompts.picture(data)}
            case AudioPart():
                data = _from_audio(part.input_audio.data)
                return {"type": "audio", "audio": media.prompts.sound(data)}
            case VideoPart():
                data = _from_url(part.video_url.url, "video/mp4", media.fetch)
                return {"type": "video", "video": media.prompts.video(data, check_wanted)}
    except RequestError as error:
        raise RequestError(f"{where}: {error}", where) from None


def _from_audio(data: str) -> bytes:
    """OpenAI sends bare base64, which has no colon; some clients send a data URL."""
    return _from_url(data, "audio/wav") if ":" in data[:8] else _from_base64(data)


def _from_url(url: str, example: str, fetch: Fetch | None = None) -> bytes:
    """The bytes of a base64 data URL, or of what is elsewhere. The bytes tell what they are."""
    scheme, colon, rest = url.partition(":")
    if fetch is not None and scheme.lower() in ("http", "https"):
        return fetch(url)
    if scheme.lower() in ("http", "https"):
        raise RequestError(
            "this server fetches nothing from elsewhere; send the file itself as a data URL,"
            f" 'data:{example};base64,…'"
        )
    head, comma, data = rest.partition(",")
    if scheme.lower() != "data" or not (colon and comma) or not head.lower().endswith(";base64"):
        raise RequestError(f"expected a data URL, 'data:{example};base64,…'")
    return _from_base64(data)


def _from_base64(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the data is not valid base64") from None
