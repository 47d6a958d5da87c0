"""OpenAI's messages → messages of the chat template, with media as the model takes them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from itertools import chain
from typing import Any

from cabochon.errors import RequestError
from cabochon.prompts import Prompts
from cabochon.serve.protocol import AudioPart, ChatMessage, ImagePart, TextPart, VideoPart

MOST = {ImagePart: (64, "pictures"), AudioPart: (16, "sounds"), VideoPart: (4, "videos")}

_ROLES = {"developer": "system"}


def chat_messages(messages: Sequence[ChatMessage], prompts: Prompts) -> list[dict[str, Any]]:
    """`messages` as `Prompts.chat` takes them, each of their media preprocessed by `prompts`.

    That is done at once, one after the other, because a file decoded is much larger than what the
    model takes of it.

    Raises:
        RequestError: a medium that is not in the request itself, cannot be decoded or is not for
            this model, or too many of them.
    """
    contents = [m.content for m in messages if not isinstance(m.content, str)]
    for kind, (most, name) in MOST.items():
        found = sum(isinstance(part, kind) for part in chain.from_iterable(contents))
        if found > most:
            raise RequestError(
                f"{found} {name} in one request, expected at most {most}", "messages"
            )
    return [_message(m, prompts, f"messages[{i}].content") for i, m in enumerate(messages)]


def _message(message: ChatMessage, prompts: Prompts, where: str) -> dict[str, Any]:
    content: str | list[dict[str, Any]]
    if isinstance(message.content, str):
        content = message.content
    else:
        content = [_part(part, prompts, f"{where}[{i}]") for i, part in enumerate(message.content)]
    return {"role": _ROLES.get(message.role, message.role), "content": content}


def _part(
    part: TextPart | ImagePart | AudioPart | VideoPart, prompts: Prompts, where: str
) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    where += f".{part.type}"
    try:
        match part:
            case ImagePart():
                data = _from_url(part.image_url.url, "image/png")
                return {"type": "image", "image": prompts.picture(data)}
            case AudioPart():
                data = _from_audio(part.input_audio.data)
                return {"type": "audio", "audio": prompts.sound(data)}
            case VideoPart():
                data = _from_url(part.video_url.url, "video/mp4")
                return {"type": "video", "video": prompts.video(data)}
    except RequestError as error:
        raise RequestError(f"{where}: {error}", where) from None


def _from_audio(data: str) -> bytes:
    """OpenAI sends bare base64, which has no colon; some clients send a data URL."""
    return _from_url(data, "audio/wav") if ":" in data[:8] else _from_base64(data)


def _from_url(url: str, example: str) -> bytes:
    """The bytes of a base64 data URL. Its media type is not believed: the bytes tell."""
    scheme, colon, rest = url.partition(":")
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
