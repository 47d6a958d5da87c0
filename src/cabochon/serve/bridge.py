"""The seam between the engine's thread and the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial

from cabochon.engine.engine import Engine
from cabochon.engine.request import Delta, Prompt, SamplingParams
from cabochon.errors import CabochonError
from cabochon.serve.auth import asker
from cabochon.serve.journal import note

Run = tuple[Prompt, SamplingParams]

MOST_UNREAD = 2048  # deltas that wait for a client before it is given up


def _too_slow() -> CabochonError:
    return CabochonError("the answer is read more slowly than it is written; it was cut off here")


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
        self._behind = False
        self._tokens = 0
        self._running: dict[int, int] = {}  # the engine's number of each run that has not ended
        try:
            for index, (prompt, params) in enumerate(runs):
                self._running[index] = engine.submit(
                    prompt, params, partial(self._hear, index), salt=asker.get()
                )
        except BaseException:
            self.close()
            raise
        note(prompt_tokens=sum(len(prompt.tokens) for prompt, _ in runs))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Until the last delta of each run, or until `close`."""
        while self._running:
            said = await self._queue.get()
            if said is None:
                return
            index, delta = said
            self._tokens += len(delta.tokens)
            if delta.last:
                self._running.pop(index, None)
                ended = delta.finish_reason or type(delta.error).__name__
                note(completion_tokens=self._tokens, finish_reason=ended)
            yield index, delta

    def close(self) -> None:
        """End the iteration, and in the engine what still runs there."""
        if self._running:
            self._queue.put_nowait(None)
        for number in self._running.values():
            self._engine.cancel(number)
        self._running = {}

    def _hear(self, index: int, delta: Delta) -> None:
        """Called by the engine's thread."""
        # The loop may be closed already when a server is torn down while the engine still runs.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, index, delta)

    def _take(self, index: int, delta: Delta) -> None:
        if self._queue.qsize() < MOST_UNREAD:
            self._queue.put_nowait((index, delta))
        elif not self._behind:
            self._behind = True
            for run, number in self._running.items():
                self._engine.cancel(number)
                self._queue.put_nowait((run, Delta(error=_too_slow())))
