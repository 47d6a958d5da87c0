"""Media by URL: from public addresses alone, pinned, whole, in time, within the limits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from serving import DEMO, picture_bytes, post, refused, serving

from cabochon.errors import RequestError
from cabochon.llm import LLM
from cabochon.serve import media
from cabochon.serve.media import Fetcher, is_public

PICTURE = picture_bytes("red")
OK = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"


@contextmanager
def origin(answer: Callable[[socket.socket, bytes], None]) -> Iterator[int]:
    """The port of a server whose every connection is given to `answer` with what was asked."""

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                answer(client, client.recv(65536))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]


def says(*pieces: bytes) -> Callable[[socket.socket, bytes], None]:
    return lambda client, asked: client.sendall(b"".join(pieces))


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "is_public", lambda address: address == "127.0.0.1")


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were looked up. All of them are on this machine."""
    names: list[str] = []

    def look_up(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        names.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(media.socket, "getaddrinfo", look_up)
    return names


@pytest.mark.usefixtures("loopback_is_public")
def test_a_file_is_fetched_and_its_name_looked_up_once(resolved: list[str]) -> None:
    asked: list[bytes] = []

    def answer(client: socket.socket, request: bytes) -> None:
        asked.append(request)
        client.sendall(OK % len(PICTURE) + PICTURE)

    with origin(answer) as port:
        assert Fetcher().fetch(f"http://pictures.example:{port}/a/b.png?c=d&e") == PICTURE
    assert resolved == ["pictures.example"]
    head = asked[0].decode().lower()
    assert head.startswith("get /a/b.png?c=d&e http/1.1\r\n")
    assert f"host: pictures.example:{port}\r\n" in head
    for name in ("authorization", "cookie", "referer"):
        assert name not in head


@pytest.mark.usefixtures("loopback_is_public", "resolved")
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (says(b"HTTP/1.1 302 Found\r\nlocation: http://10.0.0.1/\r\n\r\n"), "not followed"),
        (says(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"), "status 404"),
        (says(OK % 5000, bytes(5000)), "larger than 4,096"),
        (says(b"HTTP/1.1 200 OK\r\n\r\n", bytes(5000)), "larger than 4,096"),
        (says(OK % 4000, bytes(100)), "did not"),
        (says(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n"), "HTTPException"),
        (says(b"SSH-2.0-OpenSSH\r\n"), "BadStatusLine"),
        (says(), "RemoteDisconnected"),
    ],
    ids=["redirect", "404", "declared", "undeclared", "cut", "headers", "ssh", "nothing"],
)
def test_what_does_not_come_as_it_should(
    answer: Callable[[socket.socket, bytes], None], words: str
) -> None:
    with origin(answer) as port, pytest.raises(RequestError, match=words):
        Fetcher(most=4096).fetch(f"http://pictures.example:{port}/")


@pytest.mark.usefixtures("loopback_is_public", "resolved")
@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"])
def test_a_trickle_is_cut_off(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes well within the time that a packet has."""
    monkeypatch.setattr(media, "FETCH_SECONDS", 0.5)

    def trickle(client: socket.socket, asked: bytes) -> None:
        client.sendall(head)
        for _ in range(100):
            client.sendall(b"x")
            time.sleep(0.05)

    with origin(trickle) as port:
        start = time.monotonic()
        with pytest.raises(RequestError, match="did not"):
            Fetcher().fetch(f"http://pictures.example:{port}/")
        assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a.png",
        "file:///etc/passwd",
        "http://",
        "http:///a.png",
        "http://user:secret@example.com/",
        "http://example.com\\@127.0.0.1/",
        "http://example.com/a b",
        "http://example.com/\r\nhost: other",
        "http://example.com:99999/",
        "http://[::1",
        "http://exämple.com/",
        "http://example.com/" + "a" * 5000,
    ],
)
def test_urls_that_are_none(url: str, resolved: list[str]) -> None:
    with pytest.raises(RequestError, match=r"URL"):
        Fetcher().fetch(url)
    assert resolved == []


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_this_machine_is_not_asked_however_it_is_spelt(host: str) -> None:
    def answer(client: socket.socket, asked: bytes) -> None:
        raise AssertionError("it was asked")

    with origin(answer) as port, pytest.raises(RequestError, match="not on the public network"):
        Fetcher().fetch(f"http://{host}:{port}/")


@pytest.mark.usefixtures("loopback_is_public", "resolved")
def test_a_server_that_may_shows_a_picture_from_elsewhere() -> None:
    def ask(url: str, picture: str) -> httpx.Response:
        shown = {"type": "image_url", "image_url": {"url": picture}}
        words = {"type": "text", "text": "What colour is this rectangle?"}
        messages = [{"role": "user", "content": [shown, words]}]
        return post(url, {"model": DEMO, "messages": messages, "temperature": 0, "max_tokens": 9})

    with (
        LLM(dtype="float32", kv_cache_bytes=16 * 2**20) as llm,
        origin(says(OK % len(PICTURE), PICTURE)) as port,
    ):
        picture = f"http://pictures.example:{port}/red.png"
        with serving(llm, media_urls=True, media_hosts=["pictures.example"]) as url:
            answer = ask(url, picture).json()["choices"][0]["message"]["content"]
            assert "red" in answer.lower()
            where = "messages[0].content[0].image_url"
            refused(ask(url, "http://other.example/"), 400, where, "media_hosts")
            refused(ask(url, "file:///etc/passwd"), 400, where)
        with serving(llm) as url:
            refused(ask(url, picture), 400, where, "fetches nothing from elsewhere")


@pytest.mark.parametrize(
    "address",
    [
        "10.1.2.3", "172.16.0.1", "192.168.0.1", "127.8.8.8", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "255.255.255.255", "224.0.0.1", "198.18.0.1", "192.0.2.1",
        "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "2001:db8::1",
        "::ffff:8.8.8.8", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2001:0:a00:1::",
        "::127.0.0.1", "fec0::1",
        "", "example.com",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the order in which a name server answers would decide."""
    both = [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(media.socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(RequestError, match="not on the public network"):
        Fetcher().fetch("http://pictures.example/")


def test_hosts_may_be_listed(resolved: list[str]) -> None:
    with pytest.raises(RequestError, match="media_hosts"):
        Fetcher(["pictures.example"]).fetch("http://other.example/")
    with pytest.raises(RequestError, match="media_hosts"):
        Fetcher(["pictures.example"]).fetch("http://pictures.example.evil.example/")
    assert resolved == []
    with pytest.raises(RequestError, match="public"):
        Fetcher(["pictures.example"]).fetch("http://PICTURES.example/")
    assert resolved == ["pictures.example"]
