"""OpenAI's messages → messages of the chat template, with pictures decoded."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from PIL import Image

from cabochon.errors import RequestError
from cabochon.gemma4.pictures import decode_picture
from cabochon.serve.protocol import ChatMessage, ImagePart, TextPart

MAX_PICTURES = 64

_ROLES = {"developer": "system"}


def chat_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """`messages` as `Prompts.chat` takes them: pictures are PIL images in parts of type `image`.

    Raises:
        RequestError: a picture is not a data URL or cannot be decoded, or there are too many.
    """
    pictures = sum(isinstance(part, ImagePart) for m in messages for part in m.content)
    if pictures > MAX_PICTURES:
        raise RequestError(
            f"{pictures} pictures in one request, expected at most {MAX_PICTURES}", "messages"
        )
    return [_message(message, f"messages[{i}].content") for i, message in enumerate(messages)]


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    content: str | list[dict[str, Any]]
    if isinstance(message.content, str):
        content = message.content
    else:
        content = [_part(part, f"{where}[{i}]") for i, part in enumerate(message.content)]
    return {"role": _ROLES.get(message.role, message.role), "content": content}


def _part(part: TextPart | ImagePart, where: str) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    where += ".image_url"
    return {"type": "image", "image": _picture(part.image_url.url, where)}


def _picture(url: str, where: str) -> Image.Image:
    try:
        return decode_picture(_data(url))
    except RequestError as error:
        raise RequestError(f"{where}: {error}", where) from None


def _data(url: str) -> bytes:
    """The bytes of a base64 data URL. Its media type is not believed: the bytes tell."""
    scheme, colon, rest = url.partition(":")
    if scheme.lower() in ("http", "https"):
        raise RequestError(
            "this server fetches no pictures; send the file itself as a data URL,"
            " 'data:image/png;base64,…'"
        )
    head, comma, data = rest.partition(",")
    if scheme.lower() != "data" or not (colon and comma) or not head.lower().endswith(";base64"):
        raise RequestError("expected a data URL, 'data:image/png;base64,…'")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the data URL is not valid base64") from None
