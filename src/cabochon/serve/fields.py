"""What requests of several endpoints share: strict models, parts of messages, sampling fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from cabochon.engine.request import (
    MAX_BIAS,
    MAX_BIASES,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    SamplingParams,
)

MAX_PARTS = 1024
MAX_CHOICES = 16

STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def either(choose: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Tells members of a union apart. Tags stand in <>, so that error paths can leave them out."""
    return Discriminator(
        choose, custom_error_type="kind", custom_error_message=f"expected {expected}"
    )


def by_type(value: Any) -> str | None:
    return f"<{value.get('type')}>" if isinstance(value, dict) else None


def text_or_parts(value: Any) -> str | None:
    if isinstance(value, str):
        return "<str>"
    return "<parts>" if isinstance(value, list) else None


def is_none(value: Any) -> bool:
    return value is None


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class TextPart(BaseModel):
    model_config = STRICT

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    model_config = STRICT

    url: str
    # Without effect: the checkpoint's budget of soft tokens decides how finely a picture is seen.
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(BaseModel):
    """OpenAI's shape, or the bare URL that some clients send."""

    model_config = STRICT

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_url)]


class InputAudio(BaseModel):
    """OpenAI takes WAV and MP3; which format it is, the bytes tell."""

    model_config = STRICT

    data: str
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioPart(BaseModel):
    model_config = STRICT

    type: Literal["input_audio"]
    input_audio: InputAudio


class VideoUrl(BaseModel):
    model_config = STRICT

    url: str


class VideoPart(BaseModel):
    """OpenAI has no videos; this is the shape that other engines take."""

    model_config = STRICT

    type: Literal["video_url"]
    video_url: Annotated[VideoUrl, BeforeValidator(_as_url)]


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[AudioPart, Tag("<input_audio>")]
    | Annotated[VideoPart, Tag("<video_url>")],
    either(by_type, "a part of type 'text', 'image_url', 'input_audio' or 'video_url'"),
]
Content = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS), Tag("<parts>")],
    either(text_or_parts, "a string or a list of parts"),
]
TextContent = Annotated[
    Annotated[str, Tag("<str>")]
    | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS), Tag("<parts>")],
    either(text_or_parts, "a string or a list of parts of type 'text'"),
]

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class StreamOptions(BaseModel):
    model_config = STRICT

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # chunks are never padded


class SamplingFields(BaseModel):
    """How to choose tokens and when to end; None is the model's default, everywhere."""

    model_config = STRICT

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: dict[TokenKey, Bias] | None = Field(None, max_length=MAX_BIASES)
    stop: Annotated[list[StopString], BeforeValidator(as_list)] | None = Field(
        None, max_length=MAX_STOPS
    )
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, defaults: SamplingParams, **more: Any) -> list[SamplingParams]:
        """The request's parameters over the model's defaults, a set for each of its `n` choices.

        Choices of a seed differ from each other, and are the same every time.
        """
        names = {field.name for field in fields(SamplingParams)} & set(type(self).model_fields)
        values = {name: getattr(self, name) for name in names - {"logit_bias", "logprobs"}}
        values = {name: value for name, value in {**values, **more}.items() if value is not None}
        for name in ("stop", "stop_token_ids"):
            values[name] = tuple(values.get(name, getattr(defaults, name)))
        values["logit_bias"] = {int(key): bias for key, bias in (self.logit_bias or {}).items()}
        params = replace(defaults, **values)
        seed = params.seed
        return [
            params if seed is None or i == 0 else replace(params, seed=_wrapped(seed + i))
            for i in range(self.n or 1)
        ]


def _wrapped(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
