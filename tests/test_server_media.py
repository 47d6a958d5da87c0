"""Sounds and videos that the server takes in other spellings, and those that it refuses."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import TINY
from media import film
from serving import answers, data_url, picture_bytes, post, refused, serving

from cabochon.llm import LLM

NAME = TINY.name
PART = "messages[0].content[0]"
SOUND = f"{PART}.input_audio"
VIDEO = f"{PART}.video_url"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with LLM(TINY, dtype="float32") as llm, serving(llm, max_body_bytes=8 * 2**20) as url:
        yield url


def request(*parts: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": list(parts)}]
    return {"model": NAME, "messages": messages, "max_tokens": 1, "temperature": 0}


def silence(samples: int, kind: str = "FLAC") -> bytes:
    file = BytesIO()
    soundfile.write(file, np.zeros(samples, dtype=np.float32), 16_000, format=kind)
    return file.getvalue()


def audio(data: Any, kind: Any = "wav") -> dict[str, Any]:
    if isinstance(data, bytes):
        data = base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}


def video(data: Any) -> dict[str, Any]:
    url = data_url(data, "video/mp4") if isinstance(data, bytes) else data
    return {"type": "video_url", "video_url": {"url": url}}


WAV = silence(8_000, "WAV")
MP4 = film(frames=3)
PICTURE = {"type": "image_url", "image_url": {"url": data_url(picture_bytes("red", (9, 9)))}}


def test_data_urls_and_bare_strings_are_taken(url: str) -> None:
    plain = post(url, request(audio(WAV), video(MP4))).json()
    for parts in (
        (audio(data_url(WAV, "audio/wav")), video(MP4)),
        (audio(data_url(WAV, "audio/x-unknown"), "mp3"), video(data_url(MP4, "video/webm"))),
        (audio(WAV), {"type": "video_url", "video_url": data_url(MP4, "video/mp4")}),
    ):
        answer = post(url, request(*parts)).json()
        assert answer["choices"] == plain["choices"]
        assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"type": "input_audio"}, SOUND),
    ({"type": "input_audio", "input_audio": "UklGRg=="}, SOUND),
    ({"type": "input_audio", "input_audio": {"format": "wav"}}, f"{SOUND}.data"),
    ({"type": "input_audio", "input_audio": {"data": "UklGRg=="}}, f"{SOUND}.format"),
    (audio(5), f"{SOUND}.data"),
    (audio(None), f"{SOUND}.data"),
    (audio(WAV, "m4a"), f"{SOUND}.format"),
    (audio(WAV, "WAV"), f"{SOUND}.format"),
    (audio(WAV, None), f"{SOUND}.format"),
    ({**audio(WAV), "cache": 1}, f"{PART}.cache"),
    ({"type": "video_url"}, VIDEO),
    ({"type": "video_url", "video_url": 5}, VIDEO),
    ({"type": "video_url", "video_url": {}}, f"{VIDEO}.url"),
    (video(None), f"{VIDEO}.url"),
    ({"type": "video_url", "video_url": {"url": "data:", "fps": 2}}, f"{VIDEO}.fps"),
    ({"type": "video", "video": "data:"}, PART),
    ({"type": "audio_url", "audio_url": {"url": "data:"}}, f"{PART}.type"),
]


@pytest.mark.parametrize(("part", "param"), SHAPES, ids=lambda v: str(v)[:48])
def test_a_part_of_the_wrong_shape_is_refused_by_name(
    url: str, part: dict[str, Any], param: str
) -> None:
    refused(post(url, request(part)), 400, param)
    answers(url, NAME)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no sound": (audio(b""), SOUND, "cannot be read"),
    "no base64": (audio("****"), SOUND, "base64"),
    "base64 cut off": (audio(base64.b64encode(WAV).decode()[:-3]), SOUND, "base64"),
    "base64 in lines": (audio(base64.encodebytes(WAV).decode()), SOUND, "base64"),
    "letters beyond ASCII": (audio("é" * 8), SOUND, "base64"),
    "an address": (audio("https://example.com/a.wav"), SOUND, "data URL"),
    "a file's address": (audio("file:///etc/passwd"), SOUND, "data URL"),
    "no base64 URL": (audio("data:audio/wav,abc"), SOUND, "data URL"),
    "zeros": (audio(bytes(10_000)), SOUND, "cannot be read"),
    "a picture as a sound": (audio(picture_bytes("red")), SOUND, "cannot be read"),
    "half a sound": (audio(silence(100_000)[:60]), SOUND, "damaged"),
    "a header alone": (audio(silence(0, "WAV")), SOUND, "no samples"),
    "ten minutes": (audio(silence(9_600_000)), SOUND, "too long"),
    "thirty-one seconds": (audio(silence(496_000)), SOUND, "31.00 seconds"),
    "ten milliseconds": (audio(silence(160)), SOUND, "too short"),
    "no video": (video(b""), VIDEO, "cannot be read"),
    "no video's base64": (video("data:video/mp4;base64,****"), VIDEO, "base64"),
    "a video's address": (video("HTTPS://example.com/a.mp4"), VIDEO, "data URL"),
    "a video's zeros": (video(bytes(10_000)), VIDEO, "cannot be read"),
    "a picture as a video": (video(picture_bytes("red")), VIDEO, "cannot be read"),
    "a sound as a video": (video(WAV), VIDEO, "cannot be read"),
    "half a video": (video(MP4[: len(MP4) // 2]), VIDEO, "cannot be read"),
    "a quarter of an hour": (video(film(frames=3, rate=Fraction(1, 300))), VIDEO, "900 seconds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_medium_that_cannot_be_taken(url: str, name: str) -> None:
    part, param, words = REFUSED[name]
    refused(post(url, request(part)), 400, param, words)
    refused(post(url, {**request(part), "stream": True}), 400, param, words)
    answers(url, NAME)


def test_the_part_that_is_wrong_is_named(url: str) -> None:
    good, bad = [PICTURE, audio(WAV), video(MP4)], audio(bytes(9))
    answer = post(url, request(*good, *good, bad, *good))
    refused(answer, 400, "messages[0].content[6].input_audio")


@pytest.mark.parametrize(
    ("part", "most", "name"),
    [(PICTURE, 64, "pictures"), (audio(WAV), 16, "sounds"), (video(MP4), 4, "videos")],
)
def test_too_many(url: str, part: dict[str, Any], most: int, name: str) -> None:
    for count in (most + 1, 100):
        refused(post(url, request(*[part] * count)), 400, "messages", f"{count} {name}", str(most))
    answers(url, NAME)


def test_many_parts(url: str) -> None:
    words = {"type": "text", "text": "and"}
    assert post(url, request(*[words, audio(silence(200))] * 16)).status_code == 200
    assert post(url, request(*[words] * 100)).status_code == 200
    refused(post(url, request(*[words] * 1025)), 400, "messages[0].content")
    refused(post(url, request(*[words, PICTURE, audio(WAV)] * 50)), 400, "messages", "50 sounds")


@pytest.mark.parametrize("token", ["<|image|>", "<|audio|>", "<|video|>"])
def test_a_token_in_the_text_is_text(url: str, token: str) -> None:
    """Names of tokens in what a user writes are no media, and take no medium's place."""
    words = {"type": "text", "text": f"What is {token}?"}
    assert post(url, request(words)).status_code == 200
    with_media = post(url, request(words, audio(WAV), video(MP4), PICTURE))
    assert with_media.status_code == 200, with_media.text


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_is_of_text(url: str, role: str) -> None:
    body = request({"type": "text", "text": "Hello"})
    words = [{"type": "text", "text": "Be brief. "}, {"type": "text", "text": "Be kind."}]
    parts = post(url, {**body, "messages": [{"role": role, "content": words}, *body["messages"]]})
    whole = [{"role": "system", "content": "Be brief. Be kind."}, *body["messages"]]
    other = post(url, {**body, "messages": whole}).json()
    assert parts.json()["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
    shown = [*body["messages"], {"role": role, "content": [PICTURE]}]
    refused(post(url, {**body, "messages": shown}), 400, "messages[1].content", "text alone")
    answers(url, NAME)


@pytest.mark.parametrize(
    ("module", "part", "param"), [("soundfile", audio(WAV), SOUND), ("av", video(MP4), VIDEO)]
)
def test_without_the_extra_the_client_is_told(
    url: str, monkeypatch: pytest.MonkeyPatch, module: str, part: dict[str, Any], param: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, None)
        refused(post(url, request(part)), 400, param, "pip install 'cabochon[")
    assert post(url, request(part)).status_code == 200
