"""A hub on this machine: it speaks huggingface-hub's requests, and fails when told to."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "c0ffee" + "0" * 34
LARGE = (".safetensors", ".gguf", ".bin")  # as git-lfs keeps them

# What a fault does with a request for a file: true if it has answered.
Fault = Callable[["Handler", bytes], bool]


@dataclass
class Repository:
    """A folder as `org/name`, and what goes wrong with it."""

    folder: Path
    token: str | None = None  # without it: 401
    gated: bool = False
    elsewhere: bool = False  # large files are redirected to another host, as the hub does
    leaked: bool = False  # that host was shown a token
    faults: dict[str, list[Fault]] = field(default_factory=dict)  # by file; each counts once
    listing_status: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)  # lies about lengths
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # with ranges
    sent: Counter[str] = field(default_factory=Counter)  # bytes, by file

    def gets(self, name: str) -> list[str | None]:
        """The ranges with which `name` was asked for."""
        return [span for method, file, span in self.requests if (method, file) == ("GET", name)]


@dataclass
class FakeHub:
    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)


@contextmanager
def fake_hub(**repositories: Repository) -> Iterator[FakeHub]:
    """Serves each repository as `org/NAME`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    host, port = server.server_address[:2]
    served = {f"org/{name}": repository for name, repository in repositories.items()}
    hub = FakeHub(f"http://{host!s}:{port}", served)
    server.hub = hub  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def handle(self) -> None:
        with suppress(ConnectionError):  # whoever asked has enough
            super().handle()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, revision = "/".join(parts[2:4]), "/".join(parts[5:]) or "main"
            kind, file = parts[4] if len(parts) > 4 else "revision", ""
        elif parts[0] == "cdn":
            return self._elsewhere("/".join(parts[1:3]), "/".join(parts[3:]))
        else:
            name, file = "/".join(parts[:2]), "/".join(parts[4:])
            kind, revision = parts[2:4]
        repository = self.server.hub.repositories.get(name)  # type: ignore[attr-defined]
        if repository is None or (repository.token and not self._may(repository.token)):
            return self.refuse(401, "RepoNotFound" if repository is None else "")
        if repository.gated:
            return self.refuse(403, "GatedRepo")
        if revision not in ("main", "v2", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if kind == "revision":
            return self._listing(repository)
        if kind == "tree":
            return self._tree(repository)
        if repository.elsewhere and file.endswith(LARGE):
            return self._redirect(repository, name, file)
        return self._file(repository, file)

    def _redirect(self, repository: Repository, name: str, file: str) -> None:
        content = (repository.folder / file).read_bytes()
        self.send_response(302)
        port = self.server.server_port  # type: ignore[attr-defined]
        self.send_header("Location", f"http://localhost:{port}/cdn/{name}/{file}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-Etag", f'"{_etag(file, content)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _elsewhere(self, name: str, file: str) -> None:
        repository = self.server.hub.repositories[name]  # type: ignore[attr-defined]
        repository.leaked |= "authorization" in self.headers
        self._file(repository, file)

    def _may(self, token: str) -> bool:
        return self.headers.get("authorization") == f"Bearer {token}"

    def refuse(self, status: int, code: str = "", **headers: str) -> None:
        body = b'{"error": "no"}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _listing(self, repository: Repository) -> None:
        if repository.listing_status is not None:
            return self.refuse(repository.listing_status, Retry_After="7")
        return self.send_json(
            {"id": "org/name", "modelId": "org/name", "sha": COMMIT, "private": False,
             "downloads": 0, "tags": [], "siblings": list(_siblings(repository))}
        )  # fmt: skip

    def _tree(self, repository: Repository) -> None:
        entries = [
            {"type": "file", "path": s["rfilename"], "oid": s["blobId"], "size": s["size"],
             **({"lfs": {"oid": s["lfs"]["sha256"], "size": s["size"], "pointerSize": 1}}
                if "lfs" in s else {})}
            for s in _siblings(repository)
        ]  # fmt: skip
        self.send_json(entries)

    def _file(self, repository: Repository, name: str) -> None:
        span = self.headers.get("range")
        repository.requests.append((self.command, name, span))
        path = repository.folder / name
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        content = path.read_bytes()
        faults = repository.faults.get(name, [])
        if self.command == "GET" and faults and faults.pop(0)(self, content):
            return None
        status, data, extra = 200, content, {}
        if span is not None:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1 if last else len(content)
            status, data = 206, content[start:stop]
            extra = {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{len(content)}"}
        self.begin(name, content, status, len(data), **extra)
        if self.command == "GET":
            repository.sent[name] += len(data)
            self.wfile.write(data)
        return None

    def begin(self, name: str, content: bytes, status: int, length: int, **headers: str) -> None:
        """The head of an answer with `length` bytes of `content`."""
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_etag(name, content)}"')
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


def _siblings(repository: Repository) -> Iterator[dict[str, object]]:
    for path in sorted(repository.folder.rglob("*")):
        if not path.is_file():
            continue
        name, content = str(path.relative_to(repository.folder)), path.read_bytes()
        size = repository.sizes.get(name, len(content))
        row: dict[str, object] = {"rfilename": name, "size": size, "blobId": _etag("", content)}
        if name.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            row["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
        yield row


def _etag(name: str, content: bytes) -> str:
    kind = hashlib.sha256 if name.endswith(LARGE) else hashlib.sha1
    return kind(content).hexdigest()


def cut(after: int) -> Fault:
    """The connection breaks after so many bytes of what was asked for."""

    def fault(handler: Handler, content: bytes) -> bool:
        span = handler.headers.get("range")
        start = int(span.removeprefix("bytes=").partition("-")[0]) if span else 0
        name = handler.path.rpartition("/")[2]
        total = f"bytes {start}-{len(content) - 1}/{len(content)}"
        status, extra = (206, {"Content-Range": total}) if span else (200, {})
        handler.begin(name, content, status, len(content) - start, **extra)
        handler.wfile.write(content[start : start + after])
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.close()
        return True

    return fault


def status(code: int, **headers: str) -> Fault:
    """An answer without content."""

    def fault(handler: Handler, content: bytes) -> bool:
        handler.refuse(code, **headers)
        return True

    return fault


def without_ranges(handler: Handler, content: bytes) -> bool:
    """All of the file, whatever part of it was asked for."""
    handler.begin(handler.path.rpartition("/")[2], content, 200, len(content))
    try:
        handler.wfile.write(content)
    except OSError:  # whoever asked has enough
        handler.close_connection = True
    return True


def damaged(handler: Handler, content: bytes) -> bool:
    """One bit is not as it should be."""
    name = handler.path.rpartition("/")[2]
    handler.begin(name, content, 200, len(content))
    handler.wfile.write(content[:-1] + bytes([content[-1] ^ 1]))
    return True


def shorter(handler: Handler, content: bytes) -> bool:
    """A file that ends early and says that this is all."""
    handler.begin(handler.path.rpartition("/")[2], content, 200, len(content) - 9)
    handler.wfile.write(content[:-9])
    return True
