"""Shared by all tests: where the fixtures lie, and models loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cabochon.llm import LLM

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "e2b-bf16"  # random weights in bfloat16, E2B's architecture at toy size


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny() -> Iterator[LLM]:
    with LLM(TINY, dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="session")
def reference() -> Any:
    """transformers' own model of the tiny checkpoint, in float32."""
    from transformers import Gemma4ForConditionalGeneration

    model = Gemma4ForConditionalGeneration.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with something different in every pixel."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)
