"""`/v1/audio/transcriptions`: what a sound says, by a model that hears.

Gemma 4 transcribes when it is asked to, so this is a chat with a fixed request. The form's fields
are OpenAI's; those that would need a speech model's own timing are refused by name.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from cabochon.engine.guide import TurnRules
from cabochon.errors import CabochonError, RequestError
from cabochon.serve.answers import event
from cabochon.serve.bridge import Deltas
from cabochon.serve.errors import describe
from cabochon.serve.fields import STRICT
from cabochon.serve.requests import Fields, parse
from cabochon.serve.service import Job, Service
from cabochon.serve.spoken import Spoken, checked, listen
from cabochon.text.parser import Structure

ASK = "Transcribe the speech in this audio exactly as it is spoken. Write only the transcript."
MOST_WORDS = 2  # tokens of a transcript for each soft token of its sound, 40 ms
SHORTEST = 32
_KNOWN = Fields(
    not_served={
        "chunking_strategy": ("auto",),
        "include[]": (),
        "include": (),
        "known_speaker_names[]": (),
        "known_speaker_references[]": (),
        "timestamp_granularities[]": (),
        "timestamp_granularities": (),
    }
)
_BOOLEANS: Mapping[str, bool] = {"true": True, "false": False, "1": True, "0": False}


class TranscriptionRequest(BaseModel):
    """The form's fields beside its file. `verbose_json`, `srt` and `vtt` need times."""

    model_config = STRICT

    model: str = Field(min_length=1, max_length=1024)
    language: str | None = Field(None, pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")
    prompt: str | None = Field(None, max_length=10_000)
    response_format: str | None = Field(None, pattern="^(json|text)$")
    temperature: float | None = Field(None, ge=0, le=1)
    stream: bool | None = None


def transcription_job(service: Service, headers: Headers, body: bytes) -> Job:
    """What a form asks for.

    Raises:
        CabochonError: it is refused.
    """
    asked, sound = _read(headers, body)
    service.check_model(asked.model)
    llm = service.llm
    llm.prompts.check_sense("audio")
    words = [ASK]
    if asked.language:
        words.append(f"The speech is in the language with the code {asked.language!r}.")
    if asked.prompt:
        words.append(f"It continues this text: {asked.prompt}")
    heard = llm.prompts.sound(sound)
    parts = [
        {"type": "audio", "audio": heard},
        {"type": "text", "text": " ".join(words)},
    ]
    prompt = llm.prompts.chat([{"role": "user", "content": parts}])
    tokenizer = llm.prompts.tokenizer
    structure = Structure.of(tokenizer)
    rules = TurnRules(structure=structure, special=tokenizer.special, may_be_empty=True)
    params = replace(
        llm.defaults,
        temperature=asked.temperature or 0.0,
        # Nobody speaks so fast: what is longer repeats itself.
        max_tokens=MOST_WORDS * heard.soft_tokens + SHORTEST,
        rules=rules,
    )
    if asked.response_format == "text" and asked.stream:
        raise RequestError("a stream has no response_format 'text'", "response_format")
    answer = TranscriptionAnswer(len(prompt.tokens))
    plain = asked.response_format == "text"
    return Job([(prompt, params)], answer, bool(asked.stream), plain="text" if plain else None)


def _read(headers: Headers, body: bytes) -> tuple[TranscriptionRequest, bytes]:
    if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError("the body is no multipart/form-data, as files are sent")
    try:
        form = asyncio.run(_form(headers, body))
    except (MultiPartException, KeyError, ValueError) as error:
        reason = str(error)[:200] or "it is malformed"
        raise RequestError(f"the body is no multipart/form-data: {reason}") from None
    files = {name: value for name, value in form.multi_items() if isinstance(value, UploadFile)}
    if set(files) != {"file"}:
        raise RequestError("the form has one file, in the field 'file'", "file")
    with closing(files["file"].file) as file:
        sound = file.read()
    texts = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    return parse(_typed(texts), TranscriptionRequest, _KNOWN), sound


async def _form(headers: Headers, body: bytes) -> FormData:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(headers, stream(), max_files=1, max_fields=32, max_part_size=64 * 1024)
    # What is read stays in memory: the body is there already, and bounded.
    parser.spool_max_size = len(body) + 1
    return await parser.parse()


def _typed(texts: Mapping[str, str]) -> dict[str, Any]:
    """A form's texts as the values they stand for; what stands for none stays text."""
    fields: dict[str, Any] = dict(texts)
    if "stream" in fields:
        fields["stream"] = _BOOLEANS.get(texts["stream"].lower(), texts["stream"])
    if "temperature" in fields:
        with suppress(ValueError):
            fields["temperature"] = float(texts["temperature"])
    return fields


class TranscriptionAnswer:
    """The transcript while it is made."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens

    async def collect(self, deltas: Deltas) -> Callable[[], dict[str, Any]]:
        """What makes the whole transcript, once it is complete."""
        (spoken,) = await listen(deltas, 1)
        return lambda: {"text": spoken.text, "usage": self._usage(spoken)}

    async def events(self, deltas: Deltas) -> AsyncIterator[str]:
        """The transcript as server-sent events."""
        spoken = Spoken()
        try:
            async for _, delta in checked(deltas):
                spoken.add(delta)
                if delta.text:
                    yield event(json.dumps({"type": "transcript.text.delta", "delta": delta.text}))
        except CabochonError as error:
            yield event(json.dumps(describe(error)))
            return
        if spoken.finish is not None:
            done = {"type": "transcript.text.done", "text": spoken.text}
            yield event(json.dumps({**done, "usage": self._usage(spoken)}))

    def _usage(self, spoken: Spoken) -> dict[str, Any]:
        tokens = spoken.tally.tokens
        return {
            "type": "tokens",
            "input_tokens": self._prompt_tokens,
            "output_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
        }
