"""Whether a client still waits: nobody decodes a film for one that left."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

from starlette.requests import Request

from cabochon.errors import RequestError

Made = TypeVar("Made")

PREPARE_SECONDS = 60.0  # to fetch, decode and tokenize what one request brings


class Presence:
    """Watches the client of one request, from the event loop, until `close`."""

    def __init__(self, request: Request) -> None:
        self._left = threading.Event()
        self._on_leave: Callable[[], None] | None = None
        self._task = asyncio.create_task(self._watch(request))

    @property
    def left(self) -> bool:
        return self._left.is_set()

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._left.set()
        if self._on_leave is not None:
            self._on_leave()

    def on_leave(self, action: Callable[[], None]) -> None:
        """Do this when the client leaves, or now if it has."""
        self._on_leave = action
        if self.left:
            action()

    def close(self) -> None:
        self._task.cancel()

    def preparing(self) -> Callable[[], None]:
        """What a thread that works for the client calls now and then.

        It raises RequestError when there is no use in going on.
        """
        end = time.monotonic() + PREPARE_SECONDS

        def check() -> None:
            if self.left:
                raise RequestError("the client has left")
            if time.monotonic() > end:
                raise RequestError(
                    f"what the request brings took longer than {PREPARE_SECONDS:g} seconds to"
                    " prepare: send less of it, or later"
                )

        return check


_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


def work_for(check: Callable[[], None], work: Callable[[], Made]) -> Made:
    """`work()`, in which `check_wanted` is `check`."""
    token = _check.set(check)
    try:
        check()
        return work()
    finally:
        _check.reset(token)


def check_wanted() -> None:
    """Raise if nobody waits any more for what this thread does."""
    check = _check.get()
    if check is not None:
        check()
