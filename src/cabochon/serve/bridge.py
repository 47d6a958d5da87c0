"""The seam between the engine's thread and the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from cabochon.engine.engine import Engine
from cabochon.engine.request import Delta, Prompt, SamplingParams


class Deltas:
    """What the engine's thread says about one request, as an async iterator of one event loop."""

    def __init__(self, engine: Engine, prompt: Prompt, params: SamplingParams) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | None] = asyncio.Queue()
        self._finished = False
        self._number = engine.submit(prompt, params, self._receive)

    def _receive(self, delta: Delta) -> None:
        # The loop may be closed already when a server is torn down while the engine still runs.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, delta)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas until the last one, or until `close`."""
        while not self._finished:
            delta = await self._queue.get()
            if delta is None:
                return
            self._finished = delta.last
            yield delta

    def close(self) -> None:
        """End the iteration, and the request in the engine if it still runs there."""
        if not self._finished:
            self._finished = True
            self._queue.put_nowait(None)
            self._engine.cancel(self._number)
