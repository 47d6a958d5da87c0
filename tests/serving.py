"""A real server on a free loopback port, in a thread, for tests of the surfaces."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openai import OpenAI
from PIL import Image

from cabochon.llm import LLM
from cabochon.serve.server import Server, bind
from cabochon.settings import Settings


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[str]:
    """The address of a server of `llm`."""
    ready = threading.Event()
    with bind("127.0.0.1", 0) as listener:
        server = Server(llm, Settings(**settings), ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert ready.wait(10)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(15)
            assert not thread.is_alive()


def strict_client(url: str, key: str = "none") -> OpenAI:
    return OpenAI(
        base_url=f"{url}/v1",
        api_key=key,
        max_retries=0,
        _strict_response_validation=True,
        timeout=60,
    )


def picture_bytes(colour: str, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def show(*contents: str | bytes) -> list[dict[str, Any]]:
    """One user message of texts and pictures, in this order."""
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": content}
        if isinstance(content, str)
        else {"type": "image_url", "image_url": {"url": data_url(content)}}
        for content in contents
    ]
    return [{"role": "user", "content": parts}]


def say(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]
