"""The routes of the API: which function answers which path."""

from __future__ import annotations

import time
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from cabochon.llm import LLM
from cabochon.serve.anthropic import counted, in_anthropic_shape, message_job
from cabochon.serve.completions import chat_job, rendered
from cabochon.serve.responses import response_job
from cabochon.serve.service import Service, unknown_model
from cabochon.serve.shapes import Capabilities, ModelCard, ModelList
from cabochon.serve.text_completions import completion_job
from cabochon.serve.tokens import detokenized, tokenized
from cabochon.serve.transcriptions import transcription_job


def api_routes(service: Service) -> APIRouter:
    """Everything under `/v1`, and the tokenizer."""
    routes = APIRouter()
    card = model_card(service.llm)

    @routes.get("/v1/models")
    async def models() -> ModelList:
        """The model that this server has."""
        return ModelList(data=[card])

    @routes.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        """What is known of the model."""
        if model != card.id:
            raise unknown_model(model, card.id)
        return card

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        """The answer to a conversation."""
        return await service.respond(request, partial(chat_job, service))

    @routes.post("/v1/chat/completions/render", response_model=None)
    async def render(request: Request) -> Response:
        """The prompt that a conversation becomes."""
        return await service.tell(request, partial(rendered, service))

    @routes.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        """A text continued, or scored."""
        return await service.respond(request, partial(completion_job, service))

    @routes.post("/v1/responses", response_model=None)
    async def responses(request: Request) -> Response:
        """The answer to a conversation, as items."""
        return await service.respond(request, partial(response_job, service))

    @routes.post("/v1/messages", response_model=None)
    async def messages(request: Request) -> Response:
        """The answer to a conversation, in Anthropic's shape."""
        return await in_anthropic_shape(service.respond(request, partial(message_job, service)))

    @routes.post("/v1/messages/count_tokens", response_model=None)
    async def count_tokens(request: Request) -> Response:
        """How many tokens a conversation has, in Anthropic's shape."""
        return await in_anthropic_shape(service.tell(request, partial(counted, service)))

    @routes.post("/v1/audio/transcriptions", response_model=None)
    async def transcriptions(request: Request) -> Response:
        """What a sound says."""
        return await service.respond(request, partial(transcription_job, service, request.headers))

    @routes.post("/tokenize", response_model=None)
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or a conversation."""
        return await service.tell(request, partial(tokenized, service))

    @routes.post("/detokenize", response_model=None)
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return await service.tell(request, partial(detokenized, service))

    return routes


def model_card(llm: LLM) -> ModelCard:
    config, known = llm.config, llm.prompts.template.variables
    return ModelCard(
        id=llm.name,
        created=int(time.time()),
        context_length=llm.max_context,
        quantization=llm.report.as_dict()["groups"],
        plan_hash=llm.report.hash,
        fingerprint=llm.fingerprint,
        capabilities=Capabilities(
            vision=config.vision is not None,
            audio=config.audio is not None,
            video=config.vision is not None,
            tools="tools" in known,
            thinking="enable_thinking" in known,
        ),
    )
