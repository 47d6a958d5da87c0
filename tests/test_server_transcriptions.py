"""`/v1/audio/transcriptions` through OpenAI's own client, with a model that hears."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import soundfile
from openai import OpenAI
from serving import DEMO, HTTP, refused, serving, valid

from cabochon.llm import LLM


def sound(seconds: float = 0.5, kind: str = "WAV") -> bytes:
    file = io.BytesIO()
    wave = np.random.default_rng(0).normal(0, 0.1, int(16000 * seconds)).astype(np.float32)
    soundfile.write(file, wave, 16000, format=kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def url(tiny: LLM) -> Iterator[str]:
    with serving(tiny, max_body_bytes=8 * 2**20) as url:
        yield url


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_a_transcript(client: OpenAI, tiny: LLM, url: str, kind: str) -> None:
    """Random weights say nothing sensible, but the same as the same question in a chat."""
    data = sound(kind=kind)
    answer = client.audio.transcriptions.create(model=tiny.name, file=("a.bin", data))
    assert answer.text
    files = {"file": ("a.wav", data)}
    raw = HTTP.post(f"{url}/v1/audio/transcriptions", data={"model": tiny.name}, files=files)
    valid("CreateTranscriptionResponseJson", raw.json())
    assert raw.json()["text"] == answer.text
    plain = client.audio.transcriptions.create(
        model=tiny.name, file=("a.bin", data), response_format="text"
    )
    assert str(plain) == answer.text
    other = client.audio.transcriptions.create(
        model=tiny.name, file=("a.bin", data), language="de", prompt="Und dann"
    )
    assert other.usage.input_tokens > answer.usage.input_tokens


def test_a_stream_adds_up(client: OpenAI, tiny: LLM, url: str) -> None:
    whole = client.audio.transcriptions.create(model=tiny.name, file=("a.wav", sound()))
    events = list(
        client.audio.transcriptions.create(model=tiny.name, file=("a.wav", sound()), stream=True)
    )
    text = "".join(e.delta for e in events if e.type == "transcript.text.delta")
    assert text == whole.text
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == text
    files = {"file": ("a.wav", sound())}
    form = {"model": tiny.name, "stream": "true"}
    raw = HTTP.post(f"{url}/v1/audio/transcriptions", data=form, files=files).text
    said = [line for line in raw.split("\n\n") if line]
    assert len(said) == len(events)
    for event in said:
        valid("CreateTranscriptionResponseStreamEvent", json.loads(event.removeprefix("data: ")))


@pytest.mark.parametrize(
    ("fields", "file", "param"),
    [
        ({}, None, "file"),
        ({}, b"no sound", None),
        ({}, sound(31), None),
        ({"language": "German!"}, sound(), "language"),
        ({"response_format": "verbose_json"}, sound(), "response_format"),
        ({"response_format": "srt"}, sound(), "response_format"),
        ({"temperature": "hot"}, sound(), "temperature"),
        ({"temperature": "7"}, sound(), "temperature"),
        ({"timestamp_granularities[]": "word"}, sound(), "timestamp_granularities[]"),
        ({"stream": "maybe"}, sound(), "stream"),
        ({"colour": "red"}, sound(), "colour"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_refusals(
    url: str, tiny: LLM, fields: dict[str, str], file: bytes | None, param: str | None
) -> None:
    files = {} if file is None else {"file": ("a.wav", file)}
    response = HTTP.post(
        f"{url}/v1/audio/transcriptions",
        data={"model": tiny.name, **fields},
        files=files or {"other": ("b", b"b")},
    )
    refused(response, 400, param)


def test_what_is_no_form(url: str) -> None:
    for content, kind in (
        (b"{}", "application/json"),
        (b"--x", "multipart/form-data"),
        (b"--x\r\nnonsense", "multipart/form-data; boundary=x"),
        (b"", "multipart/form-data; boundary=x"),
    ):
        response = HTTP.post(
            f"{url}/v1/audio/transcriptions", content=content, headers={"content-type": kind}
        )
        assert response.status_code == 400, response.text
        assert json.loads(response.text)["error"]["message"]


def test_a_model_that_does_not_hear_says_so() -> None:
    fields: dict[str, Any] = {"data": {"model": DEMO}, "files": {"file": ("a.wav", sound())}}
    with LLM(dtype="float32", kv_cache_bytes=32 * 2**20) as llm, serving(llm) as url:
        response = HTTP.post(f"{url}/v1/audio/transcriptions", **fields)
        assert response.status_code == 400
        assert "hear" in response.json()["error"]["message"]
