"""What the server refuses, how it says so, and that it answers the next request all the same."""

from __future__ import annotations

import http.client
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import (
    DEMO,
    HTTP,
    answers,
    data_url,
    picture_bytes,
    post,
    refused,
    say,
    serving,
    show,
    strict_client,
)

from cabochon.llm import LLM


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with serving(llm, max_body_bytes=8 * 2**20) as url:
        yield url


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


HELLO = {"model": DEMO, "messages": say("Hello")}
IMAGE = "messages[0].content[0].image_url"


def picture(url: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": url}]
    return {"messages": [{"role": "user", "content": parts}]}


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": ["Hello"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "king", "content": "Hello"}]}, "messages[0].role"),
    (
        {"messages": [{"role": "tool", "content": "4", "tool_call_id": "1"}]},
        "messages[0].tool_call_id",
    ),
    ({"messages": [{"role": "tool", "content": "4"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "function", "content": "4"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "a", "name": "Eve"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, "messages[0].weight"),
    ({"messages": [{"role": "user", "content": "a"}] * 4097}, "messages"),
    (content("Hello"), "messages[0].content[0]"),
    (content({"text": "Hello"}), "messages[0].content[0]"),
    (content({"type": "text"}), "messages[0].content[0].text"),
    (content({"type": "text", "text": 5}), "messages[0].content[0].text"),
    (content({"type": "poem", "text": "Hello"}), "messages[0].content[0]"),
    (content({"type": "text", "text": "a", "cache": 1}), "messages[0].content[0].cache"),
    (content({"type": "audio_url", "audio_url": {}}), "messages[0].content[0].type"),
    (content({"type": "file", "file": {}}), "messages[0].content[0].type"),
    (content({"type": "image_url"}), f"{IMAGE}"),
    (picture({"url": 5}), f"{IMAGE}.url"),
    (picture({"url": "data:", "size": 3}), f"{IMAGE}.size"),
    (picture({"url": data_url(picture_bytes("red")), "detail": "ultra"}), f"{IMAGE}.detail"),
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"model": ""}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "1"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a" * 257]}, "stop[0]"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [2**30]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"n": True}, "n"),
    ({"audio": {"voice": "ash", "format": "wav"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"store": True}, "store"),
    ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"temprature": 0.5}, "temprature"),
    ({"x" * 10_000: 1}, "x" * 64 + "…"),
]


@pytest.mark.parametrize(("change", "param"), FIELDS, ids=lambda v: str(v)[:48])
def test_a_field_is_refused_by_name(url: str, change: dict[str, Any], param: str) -> None:
    refused(post(url, {**HELLO, **change}), 400, param)
    answers(url)


def test_a_misspelt_field_is_put_right(url: str) -> None:
    refused(post(url, {**HELLO, "temprature": 1}), 400, "temprature", "'temperature'")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"Hello",
        b'{"model": ',
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"Hello"',
        b"[" * 100_000,
        json.dumps({**HELLO, "temperature": 1}).replace("1}", "NaN}").encode(),
        json.dumps(HELLO).replace("Hello", "\\ud800").encode(),
    ],
    ids=lambda body: str(body)[:24],
)
def test_a_body_that_is_no_json_object(url: str, body: bytes) -> None:
    refused(post(url, body), 400, None, "JSON")
    answers(url)


@pytest.mark.parametrize("number", ["1e309", "-1e309", "1" + "0" * 5000])
def test_numbers_beyond_all_bounds(url: str, number: str) -> None:
    body = json.dumps({**HELLO, "temperature": 1}).replace(" 1}", f" {number}}}").encode()
    response = post(url, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] in ("temperature", None)
    answers(url)


PICTURES = {
    "nothing": b"",
    "text": b"Hello",
    "truncated": picture_bytes("red")[:60],
    "damaged": picture_bytes("red").replace(b"IDAT", b"IDAX"),
    "too many pixels": huge_png(60_000, 60_000),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "tiff": picture_bytes("red", kind="TIFF"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_cannot_be_seen(url: str, name: str) -> None:
    refused(post(url, {**HELLO, **picture({"url": data_url(PICTURES[name])})}), 400, IMAGE)
    answers(url)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2000, 3)])
def test_a_picture_of_odd_size_is_seen(url: str, size: tuple[int, int]) -> None:
    messages = show(picture_bytes("red", size), "What do you see?")
    response = post(url, {"model": DEMO, "messages": messages, "max_tokens": 2})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://example.com/cat.png", "data URL"),
        ("HTTP://example.com/cat.png", "data URL"),
        ("file:///etc/passwd", "data URL"),
        ("data:image/png;base64,****", "base64"),
        ("data:image/png,abc", "data URL"),
        ("cat.png", "data URL"),
        ("", "data URL"),
    ],
)
def test_pictures_come_as_data_urls_only(url: str, address: str, words: str) -> None:
    refused(post(url, {**HELLO, **picture(address)}), 400, IMAGE, words)
    answers(url)


def test_too_many_pictures(url: str) -> None:
    messages = show(*[picture_bytes("red", (4, 4))] * 65)
    refused(post(url, {**HELLO, "messages": messages}), 400, "messages", "64")
    answers(url)


def test_an_image_token_in_the_text_is_text(url: str) -> None:
    body = {"model": DEMO, "messages": say("What is <|image|>?"), "max_tokens": 1}
    assert post(url, body).status_code == 200


def test_a_context_that_is_too_long(url: str, llm: LLM) -> None:
    text = "Who are you? " * llm.max_context
    long = {**HELLO, "messages": say(text)}
    refused(post(url, long), 400, "messages", "context")
    refused(post(url, {**long, "stream": True}), 400, "messages", "context")
    answers(url)


def test_a_body_that_is_too_large(url: str) -> None:
    large = {**HELLO, "messages": say("a" * (8 * 2**20))}
    refused(post(url, large), 413, None, "max_body_bytes")
    in_chunks = iter([json.dumps(large).encode()])
    response = HTTP.post(f"{url}/v1/chat/completions", content=in_chunks)
    refused(response, 413, None, "max_body_bytes")
    answers(url)


def test_a_model_that_is_not_here(url: str) -> None:
    response = post(url, {**HELLO, "model": "gpt-4o"})
    refused(response, 404, "model", DEMO)
    assert response.json()["error"]["code"] == "model_not_found"
    assert "model" in post(url, {"messages": say("Hello")}).json()["error"]["param"]


def test_paths_and_methods_that_are_not_here(url: str) -> None:
    refused(HTTP.get(f"{url}/v2/anything"), 404, None)
    refused(HTTP.get(f"{url}/v1/chat/completions"), 405, None)
    refused(HTTP.request("OPTIONS", f"{url}/v1/chat/completions"), 405, None)
    assert HTTP.head(f"{url}/health").status_code == 405
    answers(url)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/responses", "/v1/responses"),
    ],
)
def test_a_base_url_that_is_not_quite_right(url: str, path: str, meant: str) -> None:
    refused(HTTP.post(f"{url}{path}", json=HELLO), 404, None, f"did you mean {meant}?")
    refused(HTTP.post(f"{url}/embeddings", json=HELLO), 404, None, "nothing at '/embeddings'")


def test_a_header_without_end(url: str) -> None:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.putrequest("GET", "/health")
    connection.putheader("x-long", "a" * 1_000_000)
    try:
        connection.endheaders()
        assert connection.getresponse().status == 400
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server hung up before the client had sent it all
    answers(url)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil"])
def test_another_name_for_this_machine(url: str, host: str) -> None:
    refused(HTTP.get(f"{url}/health", headers={"host": host}), 403, None)
    for name in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:80"):
        assert HTTP.get(f"{url}/health", headers={"host": name}).status_code == 200


def test_a_key(llm: LLM) -> None:
    with serving(llm, api_key="sésame") as url:
        assert HTTP.get(f"{url}/health").status_code == 200
        authorized = {b"authorization": "Bearer sésame".encode()}
        assert HTTP.get(f"{url}/v1/models", headers=authorized).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            strict_client(url, "simsim").models.list()
        for path in ("/v1/models", "/v1/models/x", "/nowhere", "/health/"):
            refused(HTTP.get(f"{url}{path}"), 401, None, "Bearer")
        for header in ("sésame", "Basic sésame", "Bearer", "Bearer sésame2"):
            value = header.encode()
            response = HTTP.get(f"{url}/v1/models", headers={b"authorization": value})
            refused(response, 401, None)


def test_a_key_of_the_client(llm: LLM) -> None:
    with serving(llm, api_key="sk-1234") as url:
        assert strict_client(url, "sk-1234").models.list().data


def test_a_fault_of_ours_shows_no_more_than_its_number(
    url: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(llm.prompts, "chat", fail)
        response = post(url, HELLO)
    refused(response, 500, None, response.headers["x-request-id"])
    assert "secret" not in response.text
    answers(url)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = [
    "messages", "model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream",
    "stream_options", "n", "tools", "user", "logit_bias", "stop_token_ids", "min_p", "metadata",
]  # fmt: skip


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(change=st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1, max_size=3))
def test_nothing_breaks_it(url: str, change: dict[str, Any]) -> None:
    response = post(url, {**HELLO, "max_tokens": 1, **change})
    assert response.status_code in (200, 400, 404), response.text
