"""What stands in front of every route: an id, who may ask, a line in the log, and an answer."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cabochon.serve.auth import OPEN, Gatekeeper, asker
from cabochon.serve.errors import ApiError, error_body, error_response
from cabochon.serve.journal import Entry
from cabochon.serve.metrics import Metrics

logger = logging.getLogger(__name__)

LEFT = 499  # what logs have, since nginx, for a client that left before it got a status
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(slots=True)
class Traffic:
    """Requests inside, and whether more may come. For one event loop."""

    inside: int = 0
    draining: bool = False


class Guard:
    """ASGI middleware."""

    def __init__(
        self, app: ASGIApp, gatekeeper: Gatekeeper, traffic: Traffic, metrics: Metrics
    ) -> None:
        self.app = app
        self.gatekeeper = gatekeeper
        self.traffic = traffic
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, _request_id(scope), self.gatekeeper.allowance(scope))
        entry = Entry(scope, answer.request_id)
        asker.set(self.gatekeeper.asker(scope))
        self.traffic.inside += 1
        try:
            await self._answer(scope, receive, answer)
        finally:
            self.traffic.inside -= 1
            status = answer.status or LEFT
            seconds = entry.close(status)
            handler = getattr(scope.get("route"), "path", "none")
            self.metrics.request(scope["method"], handler, status, seconds)

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self._front(scope)(scope, receive, answer.send)
        except ClientDisconnect:
            logger.debug("%s: the client went away", answer.request_id)
        except Exception:
            logger.exception("%s failed", answer.request_id)
            if answer.status is not None:
                raise
            message = f"the server failed on request {answer.request_id}; its log says why"
            await JSONResponse(error_body(500, message), 500)(scope, receive, answer.send)

    def _front(self, scope: Scope) -> ASGIApp:
        """The application, or what answers in its place."""
        preflight = self.gatekeeper.preflight(scope)
        if preflight is not None:
            return Response(status_code=204, headers=dict(preflight))
        refusal = self.gatekeeper.refusal(scope)
        if refusal is None and self.traffic.draining and scope["path"] != OPEN:
            refusal = ApiError(503, "the server is going down", headers={"retry-after": "5"})
        return self.app if refusal is None else error_response(refusal)


class _Answer:
    """Sends on what the application answers, with the request's id; remembers the status."""

    def __init__(self, send: Send, request_id: str, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = {"x-request-id": request_id, **headers}
        self.request_id = request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).update(self._headers)
        await self._send(message)


def _request_id(scope: Scope) -> str:
    """The client's own, if it is fit to be written into logs."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
