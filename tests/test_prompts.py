"""Prompts: what is expanded, what is joined, and what is refused instead of dropped in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import altered
from conftest import FIXTURES, hiss, noise
from media import film
from transformers import AutoTokenizer

from cabochon import LLM
from cabochon.config import read_config
from cabochon.errors import RequestError
from cabochon.prompts import Prompts

# As Gemma's own template treats a system message: it trims what must be a string.
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role in ('system', 'developer') %}"
    "<|turn>system\n{{ m.content | trim }}<turn|>\n"
    "{% else %}<|turn>user\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<|' + p.type + '|>' }}{% endfor %}"
    "{% endif %}<turn|>\n{% endif %}{% endfor %}<|turn>model\n"
)


@pytest.fixture(scope="module")
def prompts() -> Callable[[str], Prompts]:
    def of(name: str) -> Prompts:
        folder = FIXTURES / name
        return Prompts(folder, read_config(folder)[0])

    return of


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize("samples", [0, 1, 160])
def test_a_sound_too_short_for_a_tower(prompts: Callable[[str], Prompts], samples: int) -> None:
    with pytest.raises(RequestError, match=f"a sound of {samples} samples .* too short"):
        prompts("e2b-bf16").raw("<|audio|>", sounds=[hiss(samples)])
    assert prompts("e2b-bf16").sound(hiss(161)).soft_tokens == 1


def test_silence_of_no_length_without_a_tower(prompts: Callable[[str], Prompts]) -> None:
    with pytest.raises(RequestError, match=r"a sound of 0 samples .* too short"):
        prompts("12b-bf16").sound(hiss(0))
    assert prompts("12b-bf16").sound(hiss(1)).soft_tokens == 1


def test_a_sound_longer_than_a_tower_hears(prompts: Callable[[str], Prompts]) -> None:
    longest = hiss(480_000)
    assert prompts("e2b-bf16").sound(longest).soft_tokens == 750
    with pytest.raises(RequestError, match=r"30\.01 seconds is longer than the 30 that"):
        prompts("e2b-bf16").raw("<|audio|>", sounds=[np.append(longest, hiss(160))])
    assert prompts("12b-bf16").sound(np.append(longest, hiss(640))).soft_tokens == 751


def test_a_picture_beyond_the_positions_of_the_model(tmp_path: Path) -> None:
    def fewer(config: dict[str, Any]) -> None:
        config["vision_config"]["position_embedding_size"] = 60

    def narrower(tensors: dict[str, Any]) -> None:
        name = "model.vision_tower.patch_embedder.position_embedding_table"
        tensors[name] = tensors[name][:, :60]

    folder = altered(tmp_path, FIXTURES / "e2b-bf16", narrower, fewer)
    with LLM(folder, dtype="float32") as llm:
        assert llm.prompts.picture(noise(160, 40)).positions.max() == 47
        assert llm.logits("<|image|>", [noise(160, 40)]).isfinite().all()
        for size in ((2000, 30), (30, 2000)):
            with pytest.raises(RequestError, match="positions for 60 either way"):
                llm.prompts.raw("<|image|>", [noise(*size)])
        with pytest.raises(RequestError, match="positions for 60 either way"):
            llm.prompts.raw("<|video|>", videos=[film(frames=2, size=(640, 16))])


def test_a_medium_of_one_token_stands_between_start_and_end(
    prompts: Callable[[str], Prompts],
) -> None:
    made = prompts("e2b-bf16")
    ids = made.config.tokens
    around = [ids.audio_start, ids.audio, ids.audio_end]
    chat = made.chat([{"role": "user", "content": [{"type": "audio", "audio": hiss(161)}]}])
    place = chat.media[0][0]
    assert list(chat.tokens[place - 1 : place + 2]) == around
    for tokens in ([2, ids.audio], [2, *around]):
        assert list(made.raw(tokens, sounds=[hiss(161)]).tokens) == [2, *around]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_of_parts_is_one_string(tmp_path: Path, role: str) -> None:
    folder = altered(tmp_path, FIXTURES / "e2b-bf16")
    (folder / "chat_template.jinja").write_text(TRIMMING)
    prompts = Prompts(folder, read_config(folder)[0])
    user = {"role": "user", "content": [text("Hello "), text("there")]}
    parts = [{"role": role, "content": [text(" Be brief. "), text("Be kind.")]}, user]
    whole = [{"role": role, "content": " Be brief. Be kind."}, user]
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(whole)["input_ids"]
    assert list(prompts.chat(parts).tokens) == expected
    assert list(prompts.chat(whole).tokens) == expected


def test_a_system_message_holds_no_media(prompts: Callable[[str], Prompts]) -> None:
    image = {"type": "image", "image": noise(50, 50)}
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "system", "content": [text("Look:"), image]},
    ]
    with pytest.raises(RequestError, match="of text alone") as refused:
        prompts("e2b-bf16").chat(messages)
    assert refused.value.param == "messages[1].content"


def test_media_that_are_made_already_are_taken_as_they_are(
    prompts: Callable[[str], Prompts],
) -> None:
    made = prompts("e2b-bf16")
    picture, wave, video = noise(60, 40), hiss(3_000), film(frames=3)
    prompt = "<|image|><|audio|><|video|>"
    plain = made.raw(prompt, [picture], [wave], [video])
    prepared = made.raw(prompt, [made.picture(picture)], [made.sound(wave)], [made.video(video)])
    assert prepared.tokens == plain.tokens
    assert [place for place, _ in prepared.media] == [place for place, _ in plain.media]
    assert len(prepared.media) == 5


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:,"}},
        {"type": "text"},
        {"text": "no type"},
        {"type": "image", "url": "x"},
    ],
)
def test_parts_that_are_not_understood_are_refused(tiny: LLM, part: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="expected one of text, image, audio, video"):
        tiny.prompts.chat([{"role": "user", "content": [part]}])
