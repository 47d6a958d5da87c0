"""What stands in front of every route: who may ask, how many at once, how much they may send."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cabochon.serve.errors import ApiError, error_body, error_response
from cabochon.settings import Settings

logger = logging.getLogger(__name__)

BODY_SECONDS = 60.0
RETRY_SECONDS = 1

# A page of another site can make a browser send requests here under a name of its own that resolves
# to 127.0.0.1; the name it used is in the Host header.
_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?", re.IGNORECASE)


class Guard:
    """ASGI middleware: request id, Host check, key, and an answer when anything raises."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.local_only = settings.loopback
        key = settings.api_key
        self.key = _digest(key.get_secret_value().encode()) if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{uuid.uuid4().hex}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            refusal = self._refusal(scope)
            app = error_response(refusal) if refusal else self.app
            await app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.debug("%s: the client went away", request_id)
        except Exception:
            logger.exception("%s failed", request_id)
            if started:
                raise
            body = error_body(500, f"the server failed on request {request_id}; its log says why")
            await JSONResponse(body, 500)(scope, receive, send_with_id)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.local_only and not _LOCAL_HOST.fullmatch(host):
            return ApiError(
                403, f"this server answers to localhost, 127.0.0.1 and [::1], not to {host!r}"
            )
        if self.key is None or scope["path"] == "/health":
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(
            _digest(given.strip().encode("latin-1")), self.key
        ):
            return None
        return ApiError(
            401,
            "this server wants its API key in the header 'Authorization: Bearer KEY'",
            headers={"www-authenticate": "Bearer"},
        )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Gate:
    """Counts the requests inside and turns away more than `most`. For one event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.inside = 0

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Be inside for as long as the context lasts.

        Raises:
            ApiError: 429, all places are taken.
        """
        if self.inside >= self.most:
            raise ApiError(
                429,
                f"{self.inside} requests run or wait already; try again, or serve with a larger"
                " max_queue",
                headers={"retry-after": str(RETRY_SECONDS)},
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


async def read_body(request: Request, most: int) -> bytes:
    """The body of `request`, read no further than `most` bytes and a minute.

    Raises:
        ApiError: 413, 408.
        ClientDisconnect: it went away.
    """
    too_large = ApiError(413, f"the body is larger than {most:,} bytes (max_body_bytes)")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    return bytes(body)
