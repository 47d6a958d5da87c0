"""Sounds, pictures and videos from a client's request to the answer.

What the client gets is what transformers answers to the same file, prepared by transformers' own
template, processors and extractors.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import pytest
import reference
import soundfile
import torch
import transformers
from checkpoints import Tensors, config_of, tensors_of, write
from conftest import FIXTURES
from media import film
from PIL import Image
from serving import data_url, picture_bytes, say, serving, show, strict_client
from test_quantized import decompressed
from thin import fixture
from transformers import AutoTokenizer
from transformers.audio_utils import load_audio
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import (
    Gemma4Processor,
    get_aspect_ratio_preserving_size,
)
from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import (
    Gemma4UnifiedAudioFeatureExtractor,
)
from transformers.models.gemma4_unified.processing_gemma4_unified import Gemma4UnifiedProcessor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from cabochon import LLM, SamplingParams
from cabochon.engine.guide import TurnRules
from cabochon.text.parser import Structure

COUNT = 16  # tokens of an answer
GREEDY = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
HEAR = "What do you hear?"
EXTRACTORS = {"e2b": Gemma4AudioFeatureExtractor, "12b": Gemma4UnifiedAudioFeatureExtractor}
PROCESSORS = {"e2b": Gemma4Processor, "12b": Gemma4UnifiedProcessor}


class Served(NamedTuple):
    llm: LLM
    url: str


@pytest.fixture(scope="module")
def served() -> Iterator[Callable[[str], Served]]:
    """A server of a fixture, by its name."""
    open_: dict[str, tuple[Any, Served]] = {}

    def serve(name: str) -> Served:
        if name not in open_:
            llm = LLM(fixture(name), dtype="float32")
            context = serving(llm)
            open_[name] = (context, Served(llm, context.__enter__()))
        return open_[name][1]

    yield serve
    for context, server in open_.values():
        context.__exit__(None, None, None)
        server.llm.close()


@pytest.fixture(scope="module")
def oracle(
    references: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """transformers' model of a fixture; quantized ones go through compressed-tensors first."""
    from transformers import AutoModelForImageTextToText

    @cache
    def load(name: str) -> Any:
        if name.endswith("-bf16"):
            return references(name.removesuffix("-bf16"))
        config = config_of(fixture(name))
        del config["quantization_config"]
        dense = {n: t.float() for n, t in decompressed(fixture(name)).items()}
        folder = write(tmp_path_factory.mktemp(name), dense, config)
        return AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    return load


class Expected(NamedTuple):
    """What transformers makes of a request."""

    tokens: list[int]
    logits: torch.Tensor
    text: str


def prompt_text(name: str, content: list[dict[str, str]], media: dict[str, list[str]]) -> str:
    """Upstream's prompt for a user's `content`, with what each medium of it is replaced by."""
    text: str = AutoTokenizer.from_pretrained(fixture(name)).apply_chat_template(
        user(*content), tokenize=False, add_generation_prompt=True
    )
    for kind, replacements in media.items():
        pieces = text.split(f"<|{kind}|>")
        text = pieces[0] + "".join(
            replacement + piece for replacement, piece in zip(replacements, pieces[1:], strict=True)
        )
    return text


@torch.inference_mode()
def upstream(model: Any, name: str, text: str, **media: Any) -> Expected:
    """What transformers answers to a prompt whose media are expanded."""
    tokenizer = AutoTokenizer.from_pretrained(fixture(name))
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    kinds = [model.config.image_token_id, model.config.video_token_id, model.config.audio_token_id]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": sum((i + 1) * (ids == kind).long() for i, kind in enumerate(kinds)),
        **media,
    }
    logits = model(**inputs).logits[0]
    out = model.generate(
        **inputs, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, eos_token_id=None
    )
    answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return Expected(ids[0].tolist(), logits, answer)


def sounds_upstream(name: str, waves: list[Any]) -> tuple[list[str], dict[str, Any]]:
    """What stands for the waves in a prompt, and what the model takes of them."""
    member = name.partition("-")[0]
    features = EXTRACTORS[member]()(waves, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(fixture(name))
    replace = PROCESSORS[member].replace_audio_token
    return [replace(tokenizer, features, i) for i in range(len(waves))], dict(features)


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def ask(server: Served, messages: list[dict[str, Any]]) -> tuple[str | None, int]:
    """The greedy answer of a server, and how many tokens it counted in the prompt."""
    answer = strict_client(server.url).chat.completions.create(
        model=server.llm.name,
        messages=messages,  # type: ignore[arg-type]  # FLAC, Ogg and videos are not of OpenAI
        temperature=0,
        max_tokens=COUNT,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    return answer.choices[0].message.content, answer.usage.prompt_tokens


def tones(rate: int = 16_000, seconds: float = 0.7, channels: int = 1) -> Any:
    t = np.arange(int(rate * seconds)) / rate
    waves = [0.4 * np.sin(2 * np.pi * 330 * (i + 1) * t) for i in range(channels)]
    return np.stack(waves, axis=1).astype(np.float32)


def recording(kind: str, samples: Any, rate: int = 16_000) -> bytes:
    file = BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


def sound(data: bytes, kind: str) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": kind}}


def picture_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def video_part(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(data, "video/mp4")}}


def heard(data: bytes) -> np.ndarray[Any, Any]:
    """A file as upstream decodes it."""
    wave: np.ndarray[Any, Any] = load_audio(base64.b64encode(data).decode(), backend="soundfile")
    return wave


SOUNDS = {
    "wav": recording("WAV", tones()),
    "flac": recording("FLAC", tones()),
    "mp3": recording("MP3", tones()),
    "ogg": recording("OGG", tones()),
    "44.1 kHz stereo": recording("WAV", tones(44_100, channels=2), 44_100),
    "one soft token": recording("WAV", tones(seconds=0.02)),
}


@pytest.mark.parametrize("name", ["e2b-bf16", "e2b-w4a16", "12b-bf16", "12b-w4a16"])
@pytest.mark.parametrize("kind", SOUNDS)
def test_a_sound_is_heard_as_upstream_hears_it(
    served: Callable[[str], Served], oracle: Callable[[str], Any], name: str, kind: str
) -> None:
    server, data = served(name), SOUNDS[kind]
    wave = heard(data)
    content = [{"type": "audio"}, {"type": "text", "text": HEAR}]
    replacements, features = sounds_upstream(name, [wave])
    text = prompt_text(name, content, {"audio": replacements})
    expected = upstream(oracle(name), name, text, **features)
    part = sound(data, kind if kind in ("wav", "flac", "mp3", "ogg") else "wav")
    answer = ask(server, user(part, content[1]))
    local = server.llm.prompts.chat(user({"type": "audio", "audio": wave}, content[1]))
    assert list(local.tokens) == expected.tokens
    assert server.llm.generate(local, GREEDY)[0].text == expected.text
    # The server lets no special tokens be drawn but those of a turn; upstream draws any.
    tokenizer = server.llm.prompts.tokenizer
    rules = TurnRules(structure=Structure.of(tokenizer), special=tokenizer.special)
    bound = server.llm.generate(local, replace(GREEDY, rules=rules))[0]
    assert answer == (bound.text, len(expected.tokens))
    logits = server.llm.logits(expected.tokens, sounds=[wave])
    assert reference.relative_error(logits, expected.logits) < 1e-4


def test_media_and_texts_alternate_as_upstream_takes_them(
    served: Callable[[str], Served], oracle: Callable[[str], Any]
) -> None:
    name, kinds = "e2b-bf16", ("text", "image", "audio", "text", "audio", "image", "image", "text")
    pictures = [picture_bytes(c, size) for c, size in (("red", (90, 40)), ("blue", (40, 200)))]
    pictures.append(pictures[0])
    files = [SOUNDS["44.1 kHz stereo"], SOUNDS["one soft token"]]
    images = Gemma4ImageProcessorPil(max_soft_tokens=70)(
        [Image.open(BytesIO(data)) for data in pictures], return_tensors="pt"
    )
    tokenizer = AutoTokenizer.from_pretrained(fixture(name))
    shown = [Gemma4Processor.replace_image_token(tokenizer, images, i) for i in range(3)]
    audible, features = sounds_upstream(name, [heard(data) for data in files])
    content = [
        {"type": kind, "text": "and"} if kind == "text" else {"type": kind} for kind in kinds
    ]
    text = prompt_text(name, content, {"image": shown, "audio": audible})
    counts = images.pop("num_soft_tokens_per_image")
    assert len(set(map(int, counts))) == 2
    expected = upstream(oracle(name), name, text, **images, **features)

    parts = {
        "image": iter([picture_part(data) for data in pictures]),
        "audio": iter([sound(data, "wav") for data in files]),
        "text": repeat({"type": "text", "text": "and"}),
    }
    assert ask(served(name), user(*(next(parts[kind]) for kind in kinds))) == (
        expected.text,
        len(expected.tokens),
    )


def test_the_unified_model_takes_all_three(
    served: Callable[[str], Served], oracle: Callable[[str], Any]
) -> None:
    server, wave = served("12b-bf16"), heard(SOUNDS["flac"])
    picture = picture_bytes("red", (90, 40))
    prompt = server.llm.prompts.chat(
        user(
            {"type": "image", "image": Image.open(BytesIO(picture))},
            {"type": "audio", "audio": wave},
            {"type": "text", "text": HEAR},
        )
    )
    parts = [picture_part(picture), sound(SOUNDS["flac"], "flac"), {"type": "text", "text": HEAR}]
    text = server.llm.prompts.tokenizer.decode(reference.greedy(oracle("12b-bf16"), prompt, COUNT))
    assert ask(server, user(*parts)) == (text, len(prompt.tokens))


@pytest.mark.parametrize(
    ("frames", "rate"), [(40, Fraction(10)), (40, Fraction(1, 3)), (5, Fraction(24_000, 1001))]
)
def test_a_video_is_seen_as_upstream_sees_it(
    served: Callable[[str], Served], oracle: Callable[[str], Any], frames: int, rate: Fraction
) -> None:
    """Frames' pixels are held to upstream's elsewhere; here places, times and what follows."""
    name, size = "e2b-bf16", (160, 120)
    server, data = served(name), film(frames=frames, rate=rate, size=size)
    metadata = VideoMetadata(total_num_frames=frames, fps=float(rate))
    metadata.frames_indices = default_sample_indices_fn(metadata, num_frames=min(frames, 32))
    height, width = get_aspect_ratio_preserving_size(size[1], size[0], 16, 70 * 9, 3)
    described = {
        "num_soft_tokens_per_video": [height * width // 48**2],
        "video_metadata": [metadata],
    }
    tokenizer = AutoTokenizer.from_pretrained(fixture(name))
    tokenizer.video_token = "<|video|>"
    replacement = Gemma4Processor.replace_video_token(tokenizer, described, 0)
    content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    text = prompt_text(name, content, {"video": [replacement]})
    assert ("01:54 <|image>" in text) == (rate < 1)

    shown = server.llm.prompts.videos(data).frames
    expected = upstream(
        oracle(name),
        name,
        text,
        pixel_values_videos=torch.stack([torch.from_numpy(f.patches) for f in shown]),
        video_position_ids=torch.stack([torch.from_numpy(f.positions) for f in shown]),
        num_frames_per_video=torch.tensor([len(shown)]),
    )
    assert ask(server, user(video_part(data), content[1])) == (expected.text, len(expected.tokens))
    local = server.llm.prompts.raw(
        server.llm.prompts.template.render(user(*content)), videos=[data]
    )
    assert list(local.tokens) == expected.tokens


@pytest.mark.parametrize("name", ["26b-w4a16", "31b-w4a16"])
def test_a_model_that_sees_and_does_not_hear(
    served: Callable[[str], Served], oracle: Callable[[str], Any], name: str
) -> None:
    server, red = served(name), picture_bytes("red")
    with pytest.raises(openai.BadRequestError, match="this model does not hear") as refused:
        ask(server, user(sound(SOUNDS["wav"], "wav")))
    assert refused.value.param == "messages[0].content[0].input_audio"
    images = Gemma4ImageProcessorPil(max_soft_tokens=70)(
        [Image.open(BytesIO(red))], return_tensors="pt"
    )
    tokenizer = AutoTokenizer.from_pretrained(fixture(name))
    shown = Gemma4Processor.replace_image_token(tokenizer, images, 0)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = prompt_text(name, content, {"image": [shown]})
    del images["num_soft_tokens_per_image"]
    expected = upstream(oracle(name), name, text, **images)
    assert ask(server, show(red, "What is it?")) == (expected.text, len(expected.tokens))


class Export(NamedTuple):
    """How upstream saves the text part of a model alone."""

    member: str
    architecture: str
    model_type: str


EXPORTS = [
    Export("e2b", "Gemma4ForCausalLM", "gemma4_text"),
    Export("12b", "Gemma4UnifiedForCausalLM", "gemma4_unified_text"),
]


def text_export(folder: Path, export: Export) -> Path:
    """The text part of a fixture as a checkpoint of its own."""
    source = FIXTURES / f"{export.member}-bf16"
    prefix = "model.language_model."
    tensors: Tensors = {
        "model." + name.removeprefix(prefix): tensor
        for name, tensor in tensors_of(source).items()
        if name.startswith(prefix)
    }
    config = {**config_of(source)["text_config"], "architectures": [export.architecture]}
    assert config["model_type"] == export.model_type
    for file in source.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(source / "chat_template.jinja", folder)
    return write(folder, tensors, config)


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.architecture)
def test_a_text_only_export(tmp_path: Path, export: Export) -> None:
    folder = text_export(tmp_path, export)
    model, info = getattr(transformers, export.architecture).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    with LLM(folder, dtype="float32") as llm, serving(llm) as url:
        server = Served(llm, url)
        tokens = llm.prompts.chat(say("Hello there, who are you? " * 8)).tokens
        ids = torch.tensor([tokens])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0]
            out = model.generate(
                input_ids=ids,
                max_new_tokens=COUNT,
                min_new_tokens=COUNT,
                do_sample=False,
                eos_token_id=None,
            )
        assert reference.relative_error(llm.logits(list(tokens)), logits) < 1e-4
        text = llm.prompts.tokenizer.decode(out[0, len(tokens) :].tolist())
        assert ask(server, say("Hello there, who are you? " * 8)) == (text, len(tokens))
        for part, sense in (
            (picture_part(picture_bytes("red")), "this model does not see"),
            (video_part(film(frames=3)), "this model does not see"),
            (sound(SOUNDS["wav"], "wav"), "this model does not hear"),
        ):
            with pytest.raises(openai.BadRequestError, match=sense):
                ask(server, user(part))
