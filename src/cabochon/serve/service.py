"""From an HTTP request to its answer: the path that every endpoint which runs the model takes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cabochon import __version__
from cabochon.errors import RequestError
from cabochon.llm import LLM
from cabochon.serve.bridge import Deltas, Run
from cabochon.serve.errors import ApiError
from cabochon.serve.limits import Gate, read_body
from cabochon.serve.media import Fetcher
from cabochon.serve.presence import Presence, work_for
from cabochon.settings import Settings

PREPARING = 2  # requests whose JSON, media and tokens are worked on at once, off the event loop
FETCHING = 8  # more of them where they may wait for media from elsewhere
Json = dict[str, Any]
Prepared = TypeVar("Prepared")

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Answer(Protocol):
    """The shape of an endpoint's answers."""

    async def collect(self, deltas: Deltas) -> Callable[[], Json]:
        """Listens to the end. What it returns makes the whole answer, off the event loop."""

    def events(self, deltas: Deltas) -> AsyncIterator[str]:
        """The answer as server-sent events."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a request asks the engine for, and the shape of its answer."""

    runs: Sequence[Run]
    answer: Answer
    stream: bool
    plain: str | None = None  # the field of the answer that is sent alone, as text


class Service:
    """One model, its settings, and the places for requests at work."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm = llm
        self.settings = settings
        self.gate = Gate(settings.max_batch + settings.max_queue)
        self.fingerprint = fingerprint(llm)
        self.fetch = Fetcher(settings.media_hosts).fetch if settings.media_urls else None
        threads = PREPARING + (FETCHING if settings.media_urls else 0)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="cabochon-prepare")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cabochon-write")

    async def respond(self, request: Request, prepare: Callable[[bytes], Job]) -> Response:
        """The answer to one HTTP request: JSON, or a stream of events.

        Raises:
            CabochonError: the request is refused, or failed before its answer began.
        """
        with ExitStack() as stack:
            stack.enter_context(self.gate.slot())
            body = await read_body(request, self.settings.max_body_bytes)
            presence = stack.enter_context(closing(Presence(request)))
            job = await self._aside(prepare, body, presence)
            deltas = stack.enter_context(closing(Deltas(self.llm.engine, job.runs)))
            presence.on_leave(deltas.close)
            if job.stream:
                return EventStream(job.answer.events(deltas), stack.pop_all())
            make = await job.answer.collect(deltas)
            write = partial(_written, make, job.plain)
            return await asyncio.get_running_loop().run_in_executor(self._writer, write)

    async def tell(self, request: Request, prepare: Callable[[bytes], Json]) -> Response:
        """The answer to a request that the model need not run for."""
        with self.gate.slot():
            body = await read_body(request, self.settings.max_body_bytes)
            with closing(Presence(request)) as presence:
                return await self._aside(
                    lambda body: _written(partial(prepare, body)), body, presence
                )

    async def _aside(
        self, prepare: Callable[[bytes], Prepared], body: bytes, presence: Presence
    ) -> Prepared:
        work = partial(work_for, presence.preparing(), partial(prepare, body))
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except RequestError:
            if presence.left:
                raise ClientDisconnect from None
            raise

    def check_model(self, name: str) -> None:
        if name != self.llm.name:
            raise unknown_model(name, self.llm.name)


def _written(make: Callable[[], Json], plain: str | None = None) -> Response:
    """The answer that `make` makes, or one of its texts.

    Piece by piece: `json.dumps` lets no other thread run before the last of a million numbers.
    """
    answer = make()
    if plain is not None:
        return PlainTextResponse(answer[plain])
    return Response("".join(_ENCODER.iterencode(answer)), media_type="application/json")


def unknown_model(asked: str, served: str) -> ApiError:
    return ApiError(
        404,
        f"there is no model {asked[:128]!r} here; this server has {served!r}",
        param="model",
        code="model_not_found",
    )


def fingerprint(llm: LLM) -> str:
    """Changes when the version, the bytes of the weights, or how they are read, changes."""
    return f"fp_{llm.fingerprint}_{__version__}"


class EventStream(StreamingResponse):
    """Server-sent events that let go of what they hold however the sending ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], held: ExitStack) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)
