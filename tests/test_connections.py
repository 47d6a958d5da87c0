"""Clients that stall, crowd or do not read lose their connection, and nobody else notices."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress

import pytest
from serving import HTTP, say, serving, until

from cabochon.llm import LLM
from cabochon.serve import connection, server


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(10)
    client.connect((host, int(port)))
    return client


def rest(client: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    received = bytearray()
    while data := client.recv(65536):
        received += data
    return bytes(received)


def send_slowly(client: socket.socket, seconds: float) -> None:
    end = time.monotonic() + seconds
    with suppress(OSError):  # the other side has hung up
        while time.monotonic() < end:
            client.sendall(b"x")
            time.sleep(0.1)


def idle(llm: LLM) -> bool:
    engine = llm.engine
    return engine.load == 0 and engine.cache.free_pages() == engine.cache.plan.pages


@pytest.mark.parametrize(
    "begun", [b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-slow: "], ids=["nothing", "half"]
)
def test_headers_that_do_not_end(llm: LLM, begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    with serving(llm) as url, connect(url) as client:
        client.sendall(begun)
        start = time.monotonic()
        answer = rest(client)
        assert 0.3 < time.monotonic() - start < 5
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"


def test_headers_that_trickle_have_the_same_deadline(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a second request, which came over a connection that was good before."""
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.8)
    with serving(llm) as url, connect(url) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
        start = time.monotonic()
        trickle = threading.Thread(target=send_slowly, args=(client, 3.0))
        trickle.start()
        assert b"HTTP/1.1 408 " in rest(client)
        assert time.monotonic() - start < 2.5
        trickle.join()


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 99]
)
def test_what_is_no_request(llm: LLM, said: bytes) -> None:
    with serving(llm) as url, connect(url) as client:
        client.sendall(said + b"\r\n\r\n")
        answer = rest(client)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"]
        assert HTTP.get(f"{url}/health").status_code == 200


def test_more_connections_than_there_may_be(llm: LLM) -> None:
    with serving(llm, max_connections=3) as url:
        clients = [connect(url) for _ in range(3)]
        time.sleep(0.2)
        with connect(url) as late:
            answer = rest(late)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after" in answer
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            assert rest(client).startswith(b"HTTP/1.1 200 ")
            client.close()
        assert until(lambda: HTTP.get(f"{url}/health").status_code == 200)


def test_who_does_not_read_is_dropped(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request ends and its pages are free, though the client holds the connection open."""
    monkeypatch.setattr(connection, "UNREAD_SECONDS", 0.5)
    monkeypatch.setattr(server, "SEND_BUFFER_BYTES", 4096)
    body = {
        "model": llm.name,
        "messages": say("Who are you?"),
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
    }
    text = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
        f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    )
    with serving(llm) as url, connect(url, receive_buffer=2048) as client:
        client.sendall(head.encode() + text)
        assert until(lambda: llm.engine.load == 1)
        begun = llm.engine.stats.generated
        assert until(lambda: idle(llm), 60)
        generated = llm.engine.stats.generated - begun
        assert generated < llm.max_context - 200  # it was cut off, not answered to its end
        assert HTTP.get(f"{url}/health").status_code == 200
