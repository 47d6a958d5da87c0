"""Running the application: the socket, the signals, and the end of running streams."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from cabochon.errors import CabochonError
from cabochon.llm import LLM
from cabochon.serve.app import create_app
from cabochon.serve.connection import Connection
from cabochon.serve.guard import Traffic
from cabochon.serve.metrics import Metrics
from cabochon.settings import Settings

logger = logging.getLogger(__name__)

BACKLOG = 2048
LAST_WORDS_SECONDS = 5  # for what is written to arrive, once there is nothing more to write
MAX_HEADER_BYTES = 64 * 1024
SEND_BUFFER_BYTES = 128 * 1024  # of a socket; the system would let it grow to megabytes


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on `host:port`; who connects waits until it is served.

    It listens from the start, because two servers may bind one port as long as neither does: the
    second would find out only after its model was loaded.

    Raises:
        CabochonError: the address is taken, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise CabochonError(
            f"cannot listen on {host} port {port}: {error.strerror}; --host and --port set it"
        ) from None
    return listener


class Server(uvicorn.Server):
    """uvicorn with our application, limits and end; says when it listens.

    The first signal lets running answers end, and refuses everything new: the listening socket
    stays open, so that `/health` can say why. The second one ends at once.
    """

    def __init__(self, llm: LLM, settings: Settings, ready: Callable[[], None]) -> None:
        app = create_app(llm, settings)
        config = uvicorn.Config(
            app,
            http=Connection.at_most(settings.max_connections),
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=LAST_WORDS_SECONDS,
        )
        super().__init__(config)
        self._app = app
        self._llm = llm
        self._traffic: Traffic = app.state.traffic
        self._metrics: Metrics = app.state.metrics
        self._drain_seconds = settings.drain_seconds
        self._drained_by = float("inf")
        self._ready = ready

    def settle(self) -> None:
        """Do before the first request what would hold all of them up later."""
        self._app.openapi()  # a good part of a second
        # What is there now stays. Looking through it for garbage takes 160 ms, of every thread.
        gc.collect()
        gc.freeze()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watch = asyncio.create_task(self._metrics.watch_loop())
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._traffic.draining:
            self.force_exit = True
            return
        self.should_exit = False
        self._traffic.draining = True
        self._drained_by = time.monotonic() + self._drain_seconds
        logger.info(
            "stopping; %d requests get %g s to end", self._traffic.inside, self._drain_seconds
        )

    async def on_tick(self, counter: int) -> bool:
        if self._traffic.draining and not self.should_exit:
            late = time.monotonic() >= self._drained_by
            if late and self._traffic.inside:
                logger.warning("%d requests are cut off", self._traffic.inside)
                # Each stream gets an error as its last event.
                await asyncio.get_running_loop().run_in_executor(None, self._llm.engine.close)
            self.should_exit = late or not self._traffic.inside
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watch.cancel()
        await super().shutdown(sockets)


def serve(llm: LLM, settings: Settings, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C, and until running answers have ended. Main thread only."""
    # uvicorn raises the signal that ended it once more, at whoever handled it before.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    server = Server(llm, settings, ready)
    server.settle()
    server.run(sockets=[listener])
