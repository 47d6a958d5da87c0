"""Shared by all tests: where the fixtures lie, and models loaded once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cabochon.gemma4.sounds import Wave
from cabochon.kernels.library import INSTRUCTION_SETS, Library, library
from cabochon.llm import LLM

FIXTURES = Path(__file__).parent / "fixtures"
TINY = FIXTURES / "e2b-bf16"  # random weights in bfloat16, E2B's architecture at toy size

# One of each architecture, by the name of a real size.
MEMBERS = ("e2b", "12b", "26b", "31b")


# Who starts tests in the background may have SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def family() -> Iterator[Callable[[str], LLM]]:
    """The tiny bfloat16 checkpoint of a member, computing in float32."""
    made: dict[str, LLM] = {}

    def member(name: str) -> LLM:
        if name not in made:
            made[name] = LLM(FIXTURES / f"{name}-bf16", dtype="float32")
        return made[name]

    yield member
    for llm in made.values():
        llm.close()


@pytest.fixture(scope="session")
def tiny(family: Callable[[str], LLM]) -> LLM:
    return family("e2b")


@pytest.fixture(scope="session")
def references() -> Callable[[str], Any]:
    """transformers' own model of a member's tiny checkpoint, in float32."""
    from transformers import AutoModelForImageTextToText

    @cache
    def member(name: str) -> Any:
        model = AutoModelForImageTextToText.from_pretrained(
            FIXTURES / f"{name}-bf16", dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval()

    return member


@pytest.fixture(scope="session")
def reference(references: Callable[[str], Any]) -> Any:
    return references("e2b")


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The compiled kernels, in turn with every instruction set that this machine has."""
    found = library()
    if found is None:
        pytest.skip("no C++ compiler where it was installed")
    if request.param not in found.available():
        pytest.skip(f"this processor has no {request.param}")
    before = found.isa
    found.choose(request.param)
    yield found
    found.choose(before)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The demo, for a module of tests; one that wants another makes its own of this name."""
    with LLM(dtype="float32", kv_cache_bytes=64 * 2**20) as llm:
        yield llm


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    """A server of `llm`."""
    from serving import serving

    with serving(llm) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    """OpenAI's own client of the server at `url`."""
    from serving import strict_client

    return strict_client(url)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with something different in every pixel."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def hiss(samples: int, seed: int = 0) -> Wave:
    """A sound with something different in every sample."""
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)
