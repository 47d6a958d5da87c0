"""What `/openapi.json` says of bodies that the routes read themselves, and of their answers.

The routes parse bodies on their own, so that errors name fields as OpenAI's do. Their schemas come
from the same models all the same: one truth for parsing and for describing.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from cabochon import __version__
from cabochon.serve.anthropic_requests import AnthropicRequest, CountRequest
from cabochon.serve.protocol import ChatRequest
from cabochon.serve.response_requests import ResponseRequest
from cabochon.serve.shapes import ChatCompletion
from cabochon.serve.text_completions import Completion, CompletionRequest
from cabochon.serve.tokens import DetokenizeRequest, TokenizeRequest
from cabochon.serve.transcriptions import TranscriptionRequest

Json = dict[str, Any]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicErrorAnswer(BaseModel):
    """Anthropic's shape of an error."""

    type: str
    error: AnthropicErrorDetail


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(BaseModel):
    prompt: str


class RenderedPrompt(BaseModel):
    object: str
    model: str
    prompt: str
    tokens: list[int]
    count: int
    max_context: int


class Counted(BaseModel):
    input_tokens: int


class Transcript(BaseModel):
    text: str


class AnthropicMessage(BaseModel):
    id: str
    type: str
    role: str
    model: str
    content: list[Json]
    stop_reason: str | None
    stop_sequence: str | None
    usage: Json


class ResponseAnswerBody(BaseModel):
    """See OpenAI's description of a response for the rest of its fields."""

    id: str
    object: str
    status: str
    output: list[Json]


_REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/chat/completions/render": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
    "/v1/messages": AnthropicRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/v1/audio/transcriptions": TranscriptionRequest,
}
_ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/chat/completions/render": RenderedPrompt,
    "/v1/completions": Completion,
    "/v1/responses": ResponseAnswerBody,
    "/v1/messages": AnthropicMessage,
    "/v1/messages/count_tokens": Counted,
    "/tokenize": Tokens,
    "/detokenize": Text,
    "/v1/audio/transcriptions": Transcript,
}
_STREAMS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/audio/transcriptions",
    }
)
_PLAIN: Json = {"text/plain": {"schema": {"type": "string"}}}
_ERRORS = {
    "400": "a field is malformed, unknown or not supported; `param` names it",
    "401": "no key, or a wrong one",
    "403": "another name for this machine, or a page of another site",
    "404": "there is no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "429": "too many requests wait; `Retry-After` says when to come back",
    "500": "the server failed on this request",
    "503": "the server is ending",
    "504": "the request took too long",
}


def components(model: str) -> Json:
    """Schemas of all bodies and answers, by name; `model` is the one that is served."""
    models: list[type[BaseModel]] = [*_REQUESTS.values(), *_ANSWERS.values()]
    models += [ErrorAnswer, AnthropicErrorAnswer]
    _, schema = models_json_schema(
        [(model, "validation") for model in dict.fromkeys(models)],
        ref_template="#/components/schemas/{model}",
    )
    found: Json = schema["$defs"]
    for request in _REQUESTS.values():
        field = found[request.__name__]["properties"]["model"]
        field.clear()
        field.update({"type": "string", "enum": [model]})
    form = found[TranscriptionRequest.__name__]
    form["properties"]["file"] = {"type": "string", "format": "binary"}
    form["required"].append("file")
    return found


def describe_routes(paths: Json) -> None:
    """Complete the description of each path of the API in place."""
    for path, methods in paths.items():
        anthropic = path.startswith("/v1/messages")
        for operation in methods.values():
            answers = operation.setdefault("responses", {})
            answers.pop("422", None)  # what does not fit is a 400 here
            if path == "/metrics":
                answers["200"] = {"description": "The counters", "content": _PLAIN}
            if path in _REQUESTS:
                operation["requestBody"] = _body(path)
                answers["200"] = _answer(path)
            for status, text in _ERRORS.items():
                answers.setdefault(status, _failure(text, anthropic))


def _body(path: str) -> Json:
    kind = "multipart/form-data" if path.startswith("/v1/audio") else "application/json"
    return {"required": True, "content": {kind: {"schema": _ref(_REQUESTS[path].__name__)}}}


def _answer(path: str) -> Json:
    content: Json = {"application/json": {"schema": _ref(_ANSWERS[path].__name__)}}
    if path in _STREAMS:
        content["text/event-stream"] = {"schema": {"description": "An event of the answer"}}
    if path.startswith("/v1/audio"):
        content |= _PLAIN
    return {"description": "The answer", "content": content}


def _failure(text: str, anthropic: bool) -> Json:
    # What stands in front of all routes answers in OpenAI's shape.
    schema = _ref("ErrorAnswer")
    if anthropic:
        schema = {"anyOf": [_ref("AnthropicErrorAnswer"), schema]}
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def describe(app: FastAPI, model: str) -> None:
    """Let `app` describe its API in full at `/openapi.json`."""

    def openapi() -> Json:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=__version__, routes=app.routes)
            schemas = made.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(components(model))
            describe_routes(made["paths"])
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
