"""What other inference servers were broken by, asked of ours: one row for each published fault.

Only those that a request carries; docs/reliability.md says where the others are held off.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving import DEMO, HTTP, answers, data_url, picture_bytes, refused, say, show

from cabochon.files import DEMO as FOLDER
from cabochon.text.parser import TurnParser
from cabochon.text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
HELLO = {"model": DEMO, "messages": say("Hello"), "max_tokens": 2}
IMAGE = "messages[0].content[0].image_url"
VIDEO = "messages[0].content[0].video_url"
TOOL = "tools[0].function.parameters"


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {**HELLO, **fields}


def tool(parameters: Any) -> tuple[str, dict[str, Any]]:
    function = {"name": "f", "parameters": parameters, "strict": True}
    return chat(tools=[{"type": "function", "function": function}])


def media(kind: str, address: str) -> tuple[str, dict[str, Any]]:
    return chat(messages=[{"role": "user", "content": [{"type": kind, kind: {"url": address}}]}])


def frames(count: int) -> str:
    """A film as vLLM takes it: pictures in a row, behind each other."""
    one = base64.b64encode(picture_bytes("red", (4, 4), "JPEG")).decode()
    return "data:video/jpeg;base64," + ",".join([one] * count)


BAD = {"properties": []}
INCIDENTS: dict[str, tuple[tuple[str, dict[str, Any]], str]] = {
    "CVE-2026-24779": (media("image_url", "http://example.com\\@127.0.0.1/"), IMAGE),
    "CVE-2026-7020": (media("image_url", "file:///etc/../etc/passwd"), IMAGE),
    "CVE-2026-5497": (media("video_url", frames(5000)), VIDEO),
    "CVE-2026-22778": (media("image_url", data_url(b"\0\0\0\x0cjP  \r\n\x87\n" * 99)), IMAGE),
    "CVE-2025-62164": (
        ("/v1/completions", {"model": DEMO, "prompt_embeds": "UEsDBA==", "prompt": "a"}),
        "prompt_embeds",
    ),
    "CVE-2025-61620": (
        chat(chat_template="{% for i in range(10**9) %}{% endfor %}"), "chat_template"
    ),
    "CVE-2025-61620, by its other door": (
        chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}),
        "chat_template_kwargs.chat_template",
    ),
    "CVE-2025-62426": (
        chat(chat_template_kwargs={"tokenize": True}), "chat_template_kwargs.tokenize"
    ),
    "CVE-2025-48944, a type": (
        tool({"properties": {"a": {"type": "something"}}}), f"{TOOL}.properties.a"
    ),
    "CVE-2025-48944, a pattern": (
        tool({"properties": {"a": {"type": "string", "pattern": "(?P<"}}}), "tools"
    ),
    "CVE-2025-48942": (
        chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": BAD}}),
        "response_format.json_schema.schema",
    ),
    "CVE-2025-48943": (
        chat(response_format={"type": "regex", "regex": "[a-"}), "response_format.regex"
    ),
    "CVE-2026-34756": (chat(n=100_000_000), "n"),
    "CVE-2026-21869": (chat(n_discard=-1), "n_discard"),
}  # fmt: skip


@pytest.mark.parametrize("name", INCIDENTS)
def test_what_broke_others_is_refused_by_name(url: str, name: str) -> None:
    (path, body), param = INCIDENTS[name]
    begun = time.monotonic()
    response = HTTP.post(f"{url}{path}", json=body)
    assert time.monotonic() - begun < 10
    refused(response, 400, param)
    assert not re.search(r"0x[0-9a-f]{6}|Traceback|/src/|\.py", response.text)
    answers(url)


@pytest.mark.parametrize("size", [(1, 1), (1, 100_000), (100_000, 1)])
def test_cve_2026_22773(url: str, size: tuple[int, int]) -> None:
    """A picture of a pixel ended vLLM's engine."""
    body = {**HELLO, "messages": show(picture_bytes("red", size), "What do you see?")}
    assert HTTP.post(f"{url}{CHAT}", json=body).status_code in (200, 400)
    answers(url)


def test_cve_2025_48887() -> None:
    """What a model writes of a call was matched by a pattern that went back without end."""
    tokenizer = Tokenizer.open(FOLDER)
    for arguments in ("[" * 30_000, "{a:" * 10_000, "{a:" + "1" * 30_000, '{a:<|"|>' * 10_000):
        tokens = tokenizer.encode(f"<|tool_call>call:f{arguments}<tool_call|>")
        parser = TurnParser(tokenizer)
        begun = time.monotonic()
        parsed = [*map(parser.push, tokens), parser.finish()]
        assert time.monotonic() - begun < 5
        assert "".join(part.content for part in parsed) == tokenizer.spell(tokens)
        assert any(part.broken for part in parsed)


def raw(url: str, path: str) -> int:
    """The status of a path that no client would send as it stands."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        client.sendall(
            f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
        )
        return int(client.makefile("rb").readline().split()[1])


def test_paths_lead_nowhere_else(url: str) -> None:
    for name in ("../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "sha256:../../x", "a\0b"):
        assert raw(url, f"/v1/models/{name}") in (400, 404)
        refused(HTTP.post(f"{url}{CHAT}", json={**HELLO, "model": name}), 404, "model")
    for name in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "/etc/passwd"):
        assert raw(url, f"/static/{name}") == 404
    answers(url)


BODIES: dict[str, dict[str, Any]] = {
    CHAT: HELLO,
    "/v1/completions": {"model": DEMO, "prompt": "Hello", "max_tokens": 2},
    "/v1/responses": {"model": DEMO, "input": "Hello", "max_output_tokens": 2},
    "/v1/messages": {"model": DEMO, "messages": say("Hello"), "max_tokens": 2},
}


def numbers(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The numeric fields of a request, each with what the description says of it."""
    for name, field in schema["properties"].items():
        for kind in field.get("anyOf", [field]):
            if kind.get("type") in ("integer", "number"):
                yield name, kind


@pytest.mark.parametrize("path", BODIES)
def test_every_number_has_both_bounds(url: str, path: str) -> None:
    described = HTTP.get(f"{url}/openapi.json").json()
    content = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rpartition("/")[2]
    tried = 0
    for field, kind in numbers(described["components"]["schemas"][name]):
        least = kind.get("minimum", kind.get("exclusiveMinimum"))
        most = kind.get("maximum", kind.get("exclusiveMaximum"))
        assert least is not None, field
        assert most is not None, field
        beyond = [least - 1, most + 1, 2**63, -(2**63) - 1, "1", True, [1]]
        if kind["type"] == "integer":
            beyond += [1.5]
        for value in map(json.dumps, beyond):
            text = json.dumps({**BODIES[path], field: "HERE"}).replace('"HERE"', value)
            response = HTTP.post(f"{url}{path}", content=text)
            assert response.status_code == 400, (field, value)
            assert field in response.json()["error"]["message"], (field, value)
        for value in ("1e309", "NaN", "-Infinity"):
            text = json.dumps({**BODIES[path], field: "HERE"}).replace('"HERE"', value)
            assert HTTP.post(f"{url}{path}", content=text).status_code == 400, (field, value)
        tried += 1
    assert tried >= 2
    answers(url)
