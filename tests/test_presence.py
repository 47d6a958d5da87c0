"""Nobody prepares, decodes or generates for a client that left, that is late, or that lags."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest
from media import film
from serving import DEMO, answers, picture_bytes, post, say, serving, show, until

from cabochon.errors import RequestError
from cabochon.llm import LLM
from cabochon.serve import bridge, presence, server


@pytest.fixture
def slowly(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When pictures were looked at; each takes a tenth of a second."""
    seen: list[float] = []
    picture = llm.prompts.picture

    def slow(data: Any) -> Any:
        seen.append(time.monotonic())
        time.sleep(0.1)
        return picture(data)

    monkeypatch.setattr(llm.prompts, "picture", slow)
    return seen


ALBUM = {"model": DEMO, "messages": show(*[picture_bytes("red", (9, 9))] * 50)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_worked_for(
    url: str, slowly: list[float], stream: bool
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json={**ALBUM, "stream": stream}, timeout=0.5)
    time.sleep(0.4)
    count = len(slowly)
    assert 0 < count < 25
    time.sleep(0.4)
    assert len(slowly) == count
    answers(url)


def test_preparing_has_a_deadline(
    url: str, slowly: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "PREPARE_SECONDS", 0.5)
    response = post(url, ALBUM)
    assert response.status_code == 400
    assert "took longer than 0.5 seconds" in response.json()["error"]["message"]
    assert len(slowly) < 25


def test_a_film_can_be_left_between_two_frames(llm: LLM) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 15:
            raise RequestError("enough")

    assert llm.prompts.video(film(frames=10)).frames
    with pytest.raises(RequestError, match="enough"):
        llm.prompts.video(film(frames=10), check)
    assert len(calls) == 15  # ten packets and five frames


def test_a_client_that_lags_behind_is_told_and_given_up(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads all the time, so that no deadline of the connection is for it."""
    monkeypatch.setattr(server, "SEND_BUFFER_BYTES", 4096)
    monkeypatch.setattr(bridge, "MOST_UNREAD", 50)
    body = json.dumps(
        {"model": DEMO, "messages": say("Who are you?"), "stream": True, "ignore_eos": True}
    ).encode()
    head = b"POST /v1/chat/completions HTTP/1.0\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n"
    with serving(llm) as url, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        client.sendall(head % len(body) + body)
        assert until(lambda: llm.engine.load == 1)
        received = bytearray()
        while llm.engine.load:
            received += client.recv(256)
            time.sleep(0.02)
        while data := client.recv(65536):
            received += data
        assert until(lambda: llm.engine.cache.free_pages() == llm.engine.cache.plan.pages)
    last = [line for line in received.decode().splitlines() if line.startswith("data: ")][-1]
    assert "more slowly" in json.loads(last.removeprefix("data: "))["error"]["message"]
