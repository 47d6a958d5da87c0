"""The HTTP application: routes, and what answers when there is none."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from cabochon.engine.work import Limits
from cabochon.errors import CabochonError
from cabochon.llm import LLM
from cabochon.serve.api import api_routes
from cabochon.serve.auth import Gatekeeper
from cabochon.serve.errors import error_body, error_response
from cabochon.serve.guard import Guard, Traffic
from cabochon.serve.metrics import Metrics
from cabochon.serve.pages import page_routes
from cabochon.serve.schema import describe
from cabochon.serve.service import Service
from cabochon.settings import Settings

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def create_app(llm: LLM, settings: Settings) -> FastAPI:
    """The application that serves `llm`; closing `llm` is left to the caller.

    `app.state` has its `traffic` and its `metrics`.
    """
    # FastAPI's own pages for the schema load their scripts from another host.
    app = FastAPI(title="Cabochon", docs_url=None, redoc_url=None, routes=page_routes())
    llm.engine.limits = Limits(settings.max_queue_tokens, settings.request_seconds)
    app.state.traffic = traffic = Traffic()
    app.state.metrics = metrics = Metrics(llm)
    app.add_middleware(Guard, gatekeeper=Gatekeeper(settings), traffic=traffic, metrics=metrics)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(CabochonError, _answer_error)
    _add_operation(app, llm)
    app.include_router(api_routes(Service(llm, settings)))
    describe(app, llm.name)
    return app


def _add_operation(app: FastAPI, llm: LLM) -> None:
    """What operators and the page ask."""
    traffic: Traffic = app.state.traffic
    metrics: Metrics = app.state.metrics
    # Written once: of a large model it is long.
    loaded = json.dumps({**llm.report.as_dict(), "certificate": llm.certificate.as_dict()})

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether requests are answered; the one path that needs no key."""
        if not llm.engine.alive:
            return JSONResponse({"status": "the engine has stopped"}, status_code=503)
        if traffic.draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_model=None)
    async def metrics_text() -> Response:
        """Counters of engine, requests and event loop, for Prometheus."""
        return Response(metrics.text(), media_type=METRICS_TYPE)

    @app.get("/plan", response_model=dict[str, Any])
    async def plan() -> Response:
        """How the checkpoint was loaded: what `inspect --json` prints, and the certificate."""
        return Response(loaded, media_type="application/json")


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, CabochonError)
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is nothing at {request.url.path[:128]!r}{_hint(request)}",
        405: f"{request.url.path} does not take {request.method}",
    }
    body = error_body(error.status_code, messages.get(error.status_code, error.detail))
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _hint(request: Request) -> str:
    """Where the client may have wanted to go: its base URL lacks /v1, or has it twice."""
    asked = request.url.path.rstrip("/")
    paths = [path for path in request.app.openapi()["paths"] if asked and "{" not in path]
    meant = next((path for path in paths if path.endswith(asked) or asked.endswith(path)), None)
    return f"; did you mean {meant}?" if meant else ""
