"""What every model is shown: a text, pictures and sounds that are made, not shipped."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from cabochon.engine.request import Prompt
from cabochon.gemma4.sounds import SAMPLE_RATE, Wave
from cabochon.prompts import Prompts

# Plain words, numbers, code and other scripts: something of everything a tokenizer knows.
TEXT = (
    "The lighthouse keeper wrote down the weather three times a day: wind from the north-west,"
    " rain after four, visibility 2.5 miles. In 1912 he filled 1,095 lines.\n\n"
    "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n\n"
    "Das Wetter war schlecht, aber das Licht brannte. La lumière brûlait. 灯台の光が見えた。"
    " Маяк светил всю ночь.\n\n"
    '{"keeper": "A. Holm", "entries": [1, 2, 3], "lit": true}\n\n'
    "Question: how many times a day did he write? Answer: three."
)
QUESTION = "What do you see?"
HEARD = "What do you hear?"
SECONDS = 1.0  # of a sound


def rectangle(colour: str) -> Image.Image:
    """A rectangle of one colour on white, off the middle."""
    image = Image.new("RGB", (192, 144), "white")
    ImageDraw.Draw(image).rectangle((20, 30, 130, 110), fill=colour)
    return image


def tone(hertz: float) -> Wave:
    """A pure tone that swells."""
    t = np.arange(int(SAMPLE_RATE * SECONDS)) / SAMPLE_RATE
    wave: Wave = (0.3 * t / SECONDS * np.sin(2 * np.pi * hertz * t)).astype(np.float32)
    return wave


def probes(prompts: Prompts) -> Mapping[str, Prompt]:
    """A prompt for each sense that the model has, by name."""
    made = {"text": prompts.raw([*_start(prompts), *prompts.tokenizer.encode(TEXT)])}
    if prompts.config.vision is not None:
        made["picture"] = asked(prompts, "image", rectangle("red"), QUESTION)
    if prompts.config.audio is not None:
        made["sound"] = asked(prompts, "audio", tone(440.0), HEARD)
    return made


def asked(prompts: Prompts, kind: str, medium: object, question: str) -> Prompt:
    """A question about one picture or sound, in the model's own turn format."""
    content = [{"type": kind, kind: medium}, {"type": "text", "text": question}]
    return prompts.chat([{"role": "user", "content": content}])


def _start(prompts: Prompts) -> list[int]:
    start = prompts.tokenizer.token_id("<bos>")
    return [] if start is None else [start]
