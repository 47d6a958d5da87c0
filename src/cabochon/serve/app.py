"""The HTTP application: routes, and what answers when there is none."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from cabochon.errors import CabochonError
from cabochon.llm import LLM
from cabochon.serve.completions import Chat, unknown_model
from cabochon.serve.errors import error_body, error_response
from cabochon.serve.limits import Guard
from cabochon.serve.protocol import ModelCard, ModelList
from cabochon.settings import Settings


def create_app(llm: LLM, settings: Settings) -> FastAPI:
    """The application that serves `llm`; closing `llm` is left to the caller."""
    # FastAPI's pages for the schema load their scripts from another host.
    app = FastAPI(title="Cabochon", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, settings=settings)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(CabochonError, _answer_error)
    chat = Chat(llm, settings)
    card = ModelCard(id=llm.name, created=int(time.time()))

    @app.get("/health")
    async def health() -> JSONResponse:
        if llm.engine.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine has stopped"}, status_code=503)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        if model != card.id:
            raise unknown_model(model, card.id)
        return card

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        return await chat.respond(request)

    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, CabochonError)
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is nothing at {request.url.path[:128]!r}",
        405: f"{request.url.path} does not take {request.method}",
    }
    body = error_body(error.status_code, messages.get(error.status_code, error.detail))
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)
