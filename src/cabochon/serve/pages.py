"""The pages for people: files of the package, which load nothing from elsewhere and may not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

STATIC = Path(__file__).parent / "static"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# A browser that obeys this sends nothing anywhere but here, whatever an answer makes a page show.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; media-src data: blob:; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
_PAGES = {"/": "index.html", "/docs": "docs.html"}


def page_routes() -> list[BaseRoute]:
    """A route for each file below `static/`, and for the pages under their short names."""
    files = {
        f"/static/{path.relative_to(STATIC).as_posix()}": path
        for path in STATIC.rglob("*")
        if path.suffix in _TYPES
    }
    named = {name: STATIC / file for name, file in _PAGES.items()}
    return [
        Route(name, _File(path).respond, methods=["GET"]) for name, path in (named | files).items()
    ]


class _File:
    """One file, or the word that the browser has it already."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        tag = hashlib.sha256(self._content).hexdigest()[:16]
        kind = _TYPES[path.suffix]
        self._headers: Mapping[str, str] = {**_HEADERS, "content-type": kind, "etag": f'"{tag}"'}

    async def respond(self, request: Request) -> Response:
        if request.headers.get("if-none-match") == self._headers["etag"]:
            return Response(status_code=304, headers=dict(self._headers))
        return Response(self._content, headers=dict(self._headers))
