"""The seam between the engine's thread and the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from cabochon.engine.engine import Engine
from cabochon.engine.request import Delta, Prompt, SamplingParams

Run = tuple[Prompt, SamplingParams]


class Deltas:
    """What the engine's thread says about the runs of one request, for one event loop.

    Iterates over pairs: the run's place in `runs`, and what became of it.

    Raises:
        CabochonError: on construction, if the engine refuses one of them; then none is run.
    """

    def __init__(self, engine: Engine, runs: Sequence[Run]) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Delta] | None] = asyncio.Queue()
        self._running: dict[int, int] = {}  # the engine's number of each run that has not ended
        try:
            for index, (prompt, params) in enumerate(runs):
                self._running[index] = engine.submit(
                    prompt, params, _Sink(self._loop, self._queue, index)
                )
        except BaseException:
            self.close()
            raise

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Until the last delta of each run, or until `close`."""
        while self._running:
            said = await self._queue.get()
            if said is None:
                return
            index, delta = said
            if delta.last:
                self._running.pop(index, None)
            yield index, delta

    def close(self) -> None:
        """End the iteration, and in the engine what still runs there."""
        if self._running:
            self._queue.put_nowait(None)
        for number in self._running.values():
            self._engine.cancel(number)
        self._running = {}


class _Sink:
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        queue: asyncio.Queue[tuple[int, Delta] | None],
        index: int,
    ) -> None:
        self._loop = loop
        self._queue = queue
        self._index = index

    def __call__(self, delta: Delta) -> None:
        # The loop may be closed already when a server is torn down while the engine still runs.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (self._index, delta))
