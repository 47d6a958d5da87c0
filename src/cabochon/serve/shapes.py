"""Answers of `/v1/chat/completions` and `/v1/models`, after OpenAI's description of the API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from cabochon.serve.fields import is_none

ChatFinish = Literal["stop", "length", "tool_calls"]


class PromptDetails(BaseModel):
    cached_tokens: int


class CompletionDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class Called(BaseModel):
    name: str
    arguments: str


class CalledFunction(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: Called


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[ContentLogprob] | None
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[CalledFunction] | None = Field(default=None, exclude_if=is_none)


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: ChatFinish


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str


class CalledDelta(CalledFunction):
    index: int


class ChunkDelta(BaseModel):
    role: Literal["assistant"] | None = Field(default=None, exclude_if=is_none)
    content: str | None = Field(default=None, exclude_if=is_none)
    reasoning_content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[CalledDelta] | None = Field(default=None, exclude_if=is_none)


class ChunkChoice(BaseModel):
    index: int
    delta: ChunkDelta
    logprobs: Logprobs | None = Field(default=None, exclude_if=is_none)
    finish_reason: ChatFinish | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None


class Capabilities(BaseModel):
    vision: bool
    audio: bool
    video: bool
    tools: bool
    thinking: bool


class ModelCard(BaseModel):
    """OpenAI's fields, and what a client may want to know of the checkpoint beside them."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["cabochon"] = "cabochon"
    context_length: int
    quantization: list[dict[str, Any]]
    plan_hash: str | None
    fingerprint: str
    capabilities: Capabilities


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
