"""A real server on a free loopback port, in a thread, for tests of the surfaces."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
from openai import OpenAI
from PIL import Image

from cabochon.llm import LLM
from cabochon.serve.server import Server, bind
from cabochon.settings import Settings

DEMO = "cabochon-demo"
HTTP = httpx.Client(timeout=60, trust_env=False)
SCHEMAS = json.loads((Path(__file__).parent / "data" / "openai-api.json").read_text())

VALIDATORS = {
    name: jsonschema.Draft202012Validator({**SCHEMAS, "$ref": f"#/$defs/{name}"})
    for name in SCHEMAS["$defs"]
}
# The schema of each event of a stream of responses, by its type.
EVENTS = {
    SCHEMAS["$defs"][name]["properties"]["type"]["enum"][0]: name
    for name in (
        option["$ref"].rpartition("/")[2]
        for option in SCHEMAS["$defs"]["ResponseStreamEvent"]["anyOf"]
    )
}


def valid(name: str, value: Any) -> None:
    """`value` is what OpenAI's description says of this schema."""
    if name == "ResponseStreamEvent":  # one of fifty: the error of the right one says more
        name = EVENTS[value["type"]]
    VALIDATORS[name].validate(value)


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


def post(url: str, body: Any, **options: Any) -> httpx.Response:
    if isinstance(body, bytes):
        return HTTP.post(f"{url}/v1/chat/completions", content=body, **options)
    return HTTP.post(f"{url}/v1/chat/completions", json=body, **options)


def answers(url: str, model: str = DEMO) -> None:
    """The server still serves."""
    response = post(url, {"model": model, "messages": say("Who are you?"), "max_tokens": 1})
    assert response.status_code == 200, response.text


def refused(response: httpx.Response, status: int, param: str | None, *words: str) -> None:
    """An error in OpenAI's shape that names `param` and says `words`."""
    assert response.status_code == status, response.text
    body = response.json()
    valid("ErrorResponse", body)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    assert len(body["error"]["message"]) < 600
    for word in words:
        assert word in body["error"]["message"]
    assert response.headers["x-request-id"]


def until(condition: Any, seconds: float = 10.0) -> bool:
    """Whether `condition` comes true within this time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())
