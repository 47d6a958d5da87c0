"""`cabochon bench` measures what it says it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import cabochon
from typer.testing import CliRunner

from cabochon import LLM
from cabochon.bench import machine, measure
from cabochon.cli.app import app
from cabochon.errors import CabochonError
from cabochon.settings import Settings


def test_every_figure_is_there_and_possible(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    flags = ("--streams", "1,3", "--prompts", "8,40", "--tokens", "6", "--rounds", "1")
    done = cabochon("bench", *flags, "--kv-cache-bytes", "64MiB", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "GB/s read" in done.stdout
    found = json.loads(file.read_text())
    assert [(rate["streams"], rate["prompt"]) for rate in found["rates"]] == [
        (1, 8),
        (1, 40),
        (3, 8),
        (3, 40),
    ]
    for rate in found["rates"]:
        assert rate["first"] > 0
        assert rate["prefill"] > 0
        assert rate["decode"] > 0
    assert found["peak"] > 10**8


def test_the_bytes_of_a_token_are_those_of_its_matrices() -> None:
    with LLM(kv_cache_bytes=32 * 2**20) as llm:
        found = measure(llm, 0.0, streams=[1], prompts=[4], tokens=2, rounds=1)
        text = llm.config.text
    # The demo's matrices are int4 and 8-bit at most, and its head alone has this many entries.
    assert found.step_bytes > text.vocab_size * text.hidden_size // 2
    assert found.step_bytes < 8 * 2**20


def test_limits_are_those_of_a_machine() -> None:
    limits = machine()
    assert limits.read == 0 or 10**8 < limits.read < 10**13
    assert limits.multiply == 0 or 10**8 < limits.multiply < 10**15


@pytest.mark.parametrize("text", ["", "0", "1,x", "-1"])
def test_what_is_no_list_of_numbers_is_refused(text: str) -> None:
    done = cabochon("bench", "--streams", text)
    assert done.returncode == 2
    assert "--streams" in done.stderr


@pytest.mark.parametrize(
    ("flags", "guessed"), [([], 0), (["--drafter", "D"], None), (["--draft-tokens", "7"], 7)]
)
def test_nothing_is_guessed_unless_somebody_asks(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], guessed: int | None
) -> None:
    seen = []

    def load(_: str, settings: Settings) -> None:
        seen.append(settings.draft_tokens)
        raise CabochonError("enough")

    monkeypatch.setattr("cabochon.cli.bench.load", load)
    CliRunner().invoke(app, ["bench", "MODEL", *flags])
    assert seen == [guessed]
