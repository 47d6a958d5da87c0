"""What `generation_config.json` asks for is done, and what it cannot mean is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from reference import inputs

from cabochon import LLM, SamplingParams
from cabochon.engine.defaults import GenerationDefaults
from cabochon.errors import ConfigError
from cabochon.text.tokenizer import Tokenizer


def checkpoint(folder: Path, **generation: Any) -> Path:
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def read(folder: Path) -> GenerationDefaults:
    return GenerationDefaults.open(folder, Tokenizer.open(TINY))


def test_google_writes_it_so(tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path, do_sample=True, eos_token_id=[1, 5, 14], temperature=1.0, top_k=64, top_p=0.95
    )
    found = read(folder)
    assert found.sampling == SamplingParams(temperature=1.0, top_k=64, top_p=0.95)
    assert found.ends == {1, 5, 13, 14}  # <|tool_response>, in any case
    assert found.suppressed == ()


def test_without_sampling_the_likeliest_token_is_taken(tmp_path: Path) -> None:
    assert read(checkpoint(tmp_path, do_sample=False, temperature=0.7)).sampling.temperature == 0.0


def test_a_lost_file_does_not_lose_the_end_of_turns(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "generation_config.json").unlink()
    assert read(folder).ends == {1, 5, 13}  # <eos>, <turn|> and <|tool_response>


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": "1"}, "eos_token_id has '1'"),
        ({"eos_token_id": [1, 384]}, "eos_token_id has 384, expected token ids below 384"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 2.0}, "top_p is 2.0"),
        ({"suppress_tokens": [-1]}, "suppress_tokens has -1"),
    ],
)
def test_values_of_no_use_are_named(
    tmp_path: Path, generation: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json") as caught:
        read(checkpoint(tmp_path, **generation))
    assert message in str(caught.value)


def test_suppressed_tokens_are_suppressed_as_upstream_does(tmp_path: Path, reference: Any) -> None:
    with LLM(TINY, dtype="float32") as llm:
        prompt = llm.prompts.raw([2, *range(300, 340)])
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        free = llm.generate(prompt, params)[0].tokens
    unwanted = sorted(set(free))[:8]
    with LLM(checkpoint(tmp_path, suppress_tokens=unwanted), dtype="float32") as llm:
        ours = list(llm.generate(prompt, params)[0].tokens)
    theirs = reference.generate(
        **inputs(reference, prompt),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=unwanted,
    )
    assert not set(ours) & set(unwanted)
    assert ours == theirs[0, len(prompt.tokens) :].tolist()
