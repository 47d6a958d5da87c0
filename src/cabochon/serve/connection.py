"""One TCP connection: headers must come, answers must be read, and there are only so many."""

from __future__ import annotations

import asyncio
import json
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cabochon.serve.errors import error_body

HEADER_SECONDS = 10.0  # from the first byte of a request's head, or from connecting, to its last
UNREAD_SECONDS = 20.0  # that an answer may wait for its reader
UNREAD_BYTES = 16 * 1024  # of an answer that asyncio holds for its reader


def _plain(status: int, reason: str, message: str) -> bytes:
    """A whole response, for those that never became a request."""
    body = json.dumps(error_body(status, message)).encode()
    head = (
        f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: 1\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


_TOO_MANY = _plain(503, "Service Unavailable", "too many connections are open; try again")
_NO_HTTP = _plain(400, "Bad Request", "this is not a request of HTTP/1.1, or its head is too long")
_TOO_LATE = _plain(
    408, "Request Timeout", f"the headers did not arrive within {HEADER_SECONDS:g} seconds"
)


class Connection(H11Protocol):
    """uvicorn's, with the deadlines that it lacks. A client that breaks one loses the connection.

    What a client does not read stays in small buffers: asyncio's, above whose mark the application
    waits in `send`, and the socket's own.
    """

    most: ClassVar[int]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._header_alarm: asyncio.TimerHandle | None = None
        self._reader_alarm: asyncio.TimerHandle | None = None

    @classmethod
    def at_most(cls, most: int) -> type[Connection]:
        """A class of connections of which `most` may be open."""
        return type("LimitedConnection", (cls,), {"most": most})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(UNREAD_BYTES)
        if len(self.connections) > self.most:
            self._refuse(_TOO_MANY)
        else:
            self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        begun = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        if not begun:
            self._cancel_header_alarm()
        elif self._header_alarm is None:
            self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_header_alarm()
        self._cancel_reader_alarm()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader_alarm = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_reader_alarm()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # Closing waits for what is unread to be read.
        self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        self._refuse(_NO_HTTP)

    def _expect_headers(self) -> None:
        self._header_alarm = self.loop.call_later(HEADER_SECONDS, self._refuse, _TOO_LATE)

    def _refuse(self, response: bytes) -> None:
        self.transport.write(response)
        self.transport.close()

    def _cancel_header_alarm(self) -> None:
        if self._header_alarm is not None:
            self._header_alarm.cancel()
            self._header_alarm = None

    def _cancel_reader_alarm(self) -> None:
        if self._reader_alarm is not None:
            self._reader_alarm.cancel()
            self._reader_alarm = None
