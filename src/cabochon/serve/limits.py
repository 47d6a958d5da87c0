"""What bounds every request: how many at once, how much they may send, how long they may take."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from cabochon.serve.errors import ApiError

BODY_SECONDS = 60.0
FORGOTTEN_BYTES = 32 * 2**20
RETRY_SECONDS = 1


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
    """The body of `request`, if it has at most `most` bytes and comes within a minute.

    Somewhat more is read, and forgotten: who is hung up on while sending never sees the answer.

    Raises:
        ApiError: 413, 408.
        ClientDisconnect: it went away.
    """
    too_large = ApiError(413, f"the body is larger than {most:,} bytes (max_body_bytes)")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > most + FORGOTTEN_BYTES:
        raise too_large
    body = bytearray()
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    body += chunk
                elif size > most + FORGOTTEN_BYTES:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    if size > most:
        raise too_large
    return bytes(body)
