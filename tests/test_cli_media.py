"""Sounds and videos on the command line, and in a chat through a pipe."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command import TALKATIVE, cabochon, fails
from conftest import FIXTURES
from media import film
from PIL import Image
from serving import picture_bytes

from cabochon.gemma4.sounds import decode_sound
from cabochon.llm import LLM


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    path.write_bytes(picture_bytes("red"))
    return path


@pytest.fixture
def tone(tmp_path: Path) -> Path:
    path = tmp_path / "tone.ogg"
    soundfile.write(path, np.sin(np.arange(22_050) * 0.1), 44_100)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(film(frames=3))
    return path


def test_run_takes_sounds_and_videos(red: Path, tone: Path, clip: Path) -> None:
    greedy = ["--temperature", "0", "--max-tokens", "4", "--verbose"]
    sent = ["--audio", tone, "--audio", tone, "--video", clip, "--image", red]
    result = cabochon("run", TALKATIVE, "-p", "What is it?", *sent, *greedy)
    assert result.returncode == 0, result.stderr
    with LLM(TALKATIVE) as llm:
        parts = [
            {"type": "image", "image": Image.open(red)},
            *[{"type": "audio", "audio": decode_sound(tone.read_bytes())}] * 2,
            {"type": "video", "video": clip.read_bytes()},
            {"type": "text", "text": "What is it?"},
        ]
        prompt = llm.prompts.chat([{"role": "user", "content": parts}])
    assert f"{len(prompt.tokens)} prompt tokens, 4 answered" in result.stderr


@pytest.mark.parametrize(
    ("option", "file", "words"),
    [
        ("--audio", "/nowhere/cat.wav", "cat.wav"),
        ("--audio", __file__, "WAV, FLAC, MP3 or Ogg"),
        ("--video", "/nowhere/cat.mp4", "cat.mp4"),
        ("--video", __file__, "undamaged MP4"),
        ("--video", ".", "directory"),
    ],
)
def test_files_that_cannot_be_used(option: str, file: str, words: str) -> None:
    fails(cabochon("run", "-p", "Hello", option, file), 2, words)


def test_sounds_and_videos_in_a_conversation(tmp_path: Path, tone: Path, clip: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(bytes(1000))
    lines = [
        f"/audio {tone}", "What is it?", f"/video {clip}", f"/audio {garbage}",
        f"/video {garbage}", "/audio", "And this?", "And then?", "/help",
    ]  # fmt: skip
    greedy = ["--temperature", "0", "--max-tokens", "4", "--verbose"]
    result = cabochon("run", TALKATIVE, *greedy, stdin="\n".join(lines))
    assert result.returncode == 2
    sizes = [int(n) for n in re.findall(r"(\d+) prompt tokens", result.stderr)]
    assert len(sizes) == 3
    assert sizes[1] - sizes[0] > 3 * 60  # three frames
    assert sizes[2] - sizes[1] < 60  # what waited is not sent again
    assert "tone.ogg goes with the next message" in result.stderr
    assert result.stderr.count("error: ") == 2
    assert f"error: sound {garbage}: a sound cannot be read" in result.stderr
    assert f"error: video {garbage}: a video cannot be read" in result.stderr
    assert "/audio wants a FILE" in result.stderr
    assert "/video FILE" in result.stderr


def test_what_made_a_message_fail_does_not_wait_for_the_next(red: Path) -> None:
    lines = f"/image {red}\nWhat is it?\nHello\n"
    arguments = ["--temperature", "0", "--max-tokens", "2", "--max-context", "40"]
    result = cabochon("run", TALKATIVE, *arguments, stdin=lines)
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert "(the files that were to go with it are forgotten)" in result.stderr
    assert result.stdout.strip()


def test_what_a_model_cannot_take_is_told_with_the_file(red: Path, tone: Path) -> None:
    deaf = FIXTURES / "31b-w4a16"
    fails(cabochon("run", deaf, "-p", "Hello", "--audio", tone), 2, str(tone), "does not hear")
    result = cabochon("run", deaf, stdin=f"/audio {tone}\nHello\n")
    assert result.returncode == 2
    assert f"error: sound {tone}: this model does not hear" in result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("module", "option", "extra"), [("soundfile", "--audio", "audio"), ("av", "--video", "video")]
)
def test_without_an_extra(tmp_path: Path, tone: Path, module: str, option: str, extra: str) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError\n")
    result = cabochon("run", "-p", "Hello", option, tone, PYTHONPATH=str(tmp_path))
    fails(result, 2, f"pip install 'cabochon[{extra}]'")
