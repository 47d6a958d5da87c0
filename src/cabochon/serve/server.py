"""Running the application: the socket, the signals, and the end of running streams."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from cabochon.errors import CabochonError
from cabochon.llm import LLM
from cabochon.serve.app import create_app
from cabochon.settings import Settings

logger = logging.getLogger(__name__)

BACKLOG = 2048
DRAIN_SECONDS = 30
MAX_HEADER_BYTES = 64 * 1024


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
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        raise CabochonError(
            f"cannot listen on {host} port {port}: {error.strerror}; --host and --port set it"
        ) from None
    return listener


class Server(uvicorn.Server):
    """uvicorn with our application and limits; says when it listens."""

    def __init__(self, llm: LLM, settings: Settings, ready: Callable[[], None]) -> None:
        config = uvicorn.Config(
            create_app(llm, settings),
            http="h11",
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            ws="none",
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logger.info("stopping; running answers get %d s to end", DRAIN_SECONDS)
        await super().shutdown(sockets)


def serve(llm: LLM, settings: Settings, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; running answers get half a minute to end. Main thread only."""
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # `ready` and `shutdown` say it
    # uvicorn raises the signal that ended it once more, at whoever handled it before.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    Server(llm, settings, ready).run(sockets=[listener])
