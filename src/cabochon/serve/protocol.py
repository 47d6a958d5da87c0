"""Requests and responses of `/v1/chat/completions`, after OpenAI's description of the API (2.3.0).

`ChatRequest` has the fields that are served; `requests.py` says what happens to all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from cabochon.engine.request import MAX_STOP_LENGTH, MAX_STOPS, FinishReason, SamplingParams

MAX_MESSAGES = 4096
MAX_PARTS = 1024

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _either(choose: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Tells members of a union apart. Tags stand in <>, so that error paths can leave them out."""
    return Discriminator(
        choose, custom_error_type="kind", custom_error_message=f"expected {expected}"
    )


def _part_tag(value: Any) -> str | None:
    return f"<{value.get('type')}>" if isinstance(value, dict) else None


def _content_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "<str>"
    return "<parts>" if isinstance(value, list) else None


def _is_none(value: Any) -> bool:
    return value is None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class TextPart(BaseModel):
    model_config = _STRICT

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    model_config = _STRICT

    url: str
    # Without effect: the checkpoint's budget of soft tokens decides how finely a picture is seen.
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(BaseModel):
    """OpenAI's shape, or the bare URL that some clients send."""

    model_config = _STRICT

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_url)]


class InputAudio(BaseModel):
    """OpenAI takes WAV and MP3; which format it is, the bytes tell."""

    model_config = _STRICT

    data: str
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioPart(BaseModel):
    model_config = _STRICT

    type: Literal["input_audio"]
    input_audio: InputAudio


class VideoUrl(BaseModel):
    model_config = _STRICT

    url: str


class VideoPart(BaseModel):
    """OpenAI has no videos; this is the shape that other engines take."""

    model_config = _STRICT

    type: Literal["video_url"]
    video_url: Annotated[VideoUrl, BeforeValidator(_as_url)]


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[AudioPart, Tag("<input_audio>")]
    | Annotated[VideoPart, Tag("<video_url>")],
    _either(_part_tag, "a part of type 'text', 'image_url', 'input_audio' or 'video_url'"),
]


class ChatMessage(BaseModel):
    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<str>")]
        | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS), Tag("<parts>")],
        _either(_content_tag, "a string or a list of parts"),
    ]


class StreamOptions(BaseModel):
    model_config = _STRICT

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # chunks are never padded


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class ChatRequest(BaseModel):
    """A chat completion that can be served. None is the model's default, everywhere."""

    model_config = _STRICT

    model: str = Field(min_length=1, max_length=1024)
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stop: Annotated[list[StopString], BeforeValidator(_as_list)] | None = Field(
        None, max_length=MAX_STOPS
    )
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        """The request's parameters over the model's defaults."""
        names = {field.name for field in fields(SamplingParams)} & set(ChatRequest.model_fields)
        given = {name: getattr(self, name) for name in names}
        given["max_tokens"] = self.max_completion_tokens or self.max_tokens
        values = {name: value for name, value in given.items() if value is not None}
        for name in ("stop", "stop_token_ids"):
            values[name] = tuple(values.get(name, getattr(defaults, name)))
        return replace(defaults, **values)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str


class ChunkDelta(BaseModel):
    role: Literal["assistant"] | None = Field(default=None, exclude_if=_is_none)
    content: str | None = Field(default=None, exclude_if=_is_none)


class ChunkChoice(BaseModel):
    index: int = 0
    delta: ChunkDelta
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["cabochon"] = "cabochon"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
