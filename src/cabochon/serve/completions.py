"""One chat completion, from an HTTP request to its answer: the path that everything else serves."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cabochon import __version__
from cabochon.engine.request import Prompt, SamplingParams
from cabochon.errors import RequestError
from cabochon.llm import LLM
from cabochon.serve.answers import Answer
from cabochon.serve.bridge import Deltas
from cabochon.serve.errors import ApiError
from cabochon.serve.limits import Gate, read_body
from cabochon.serve.messages import chat_messages
from cabochon.serve.protocol import ChatRequest
from cabochon.serve.requests import parse_request
from cabochon.settings import Settings

PREPARING = 2  # requests whose JSON, media and tokens are worked on at once, off the event loop


class Chat:
    """Answers `/v1/chat/completions` with one model."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm = llm
        self.max_body_bytes = settings.max_body_bytes
        self.gate = Gate(settings.max_batch + settings.max_queue)
        self.fingerprint = fingerprint(llm)
        self._pool = ThreadPoolExecutor(PREPARING, thread_name_prefix="cabochon-prepare")

    async def respond(self, request: Request) -> Response:
        """The answer to one HTTP request: JSON, or a stream of events.

        Raises:
            CabochonError: the request is refused, or failed before its answer began.
        """
        with ExitStack() as stack:
            stack.enter_context(self.gate.slot())
            body = await read_body(request, self.max_body_bytes)
            loop = asyncio.get_running_loop()
            chat, prompt, params = await loop.run_in_executor(self._pool, self._prepare, body)
            answer = Answer(chat, len(prompt.tokens), self.fingerprint)
            deltas = Deltas(self.llm.engine, prompt, params)
            stack.callback(deltas.close)
            watcher = asyncio.create_task(_await_disconnect(request, deltas))
            stack.callback(watcher.cancel)
            if chat.stream:
                return EventStream(answer.events(deltas), stack.pop_all())
            return JSONResponse((await answer.collect(deltas)).model_dump())

    def _prepare(self, body: bytes) -> tuple[ChatRequest, Prompt, SamplingParams]:
        chat = parse_request(body)
        if chat.model != self.llm.name:
            raise unknown_model(chat.model, self.llm.name)
        vocab = self.llm.config.text.vocab_size
        if any(token >= vocab for token in chat.stop_token_ids or ()):
            raise RequestError(f"stop_token_ids must be 0 to {vocab - 1}", "stop_token_ids")
        prompt = self.llm.prompts.chat(chat_messages(chat.messages, self.llm.prompts))
        return chat, prompt, chat.sampling(self.llm.defaults)


def unknown_model(asked: str, served: str) -> ApiError:
    return ApiError(
        404,
        f"there is no model {asked[:128]!r} here; this server has {served!r}",
        param="model",
        code="model_not_found",
    )


def fingerprint(llm: LLM) -> str:
    """Changes when the version, or what was read from the checkpoint and how, changes."""
    plan = json.dumps(llm.report.as_dict(), sort_keys=True, default=str)
    return "fp_" + hashlib.sha256(f"{__version__}\n{plan}".encode()).hexdigest()[:16]


class EventStream(StreamingResponse):
    """Server-sent events that let go of what they hold however the sending ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], held: ExitStack) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def _await_disconnect(request: Request, deltas: Deltas) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    deltas.close()
