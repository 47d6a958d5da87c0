"""What bounds every request: how many at once, how much they may send, how long they may take."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from cabochon.serve.errors import ApiError

BODY_SECONDS = 60.0
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
