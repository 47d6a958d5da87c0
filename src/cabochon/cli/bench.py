"""`cabochon bench`: how fast a checkpoint runs on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from cabochon.cli.model import load
from cabochon.cli.options import Debug
from cabochon.errors import CabochonError
from cabochon.files import write_text
from cabochon.flags import with_settings
from cabochon.settings import EngineSettings, Settings


@with_settings(EngineSettings)
def bench(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Checkpoint; the demo without it")
    ] = None,
    streams: Annotated[
        str, typer.Option("--streams", help="Requests at once, such as 1,4,16")
    ] = "1,4",
    prompts: Annotated[
        str, typer.Option("--prompts", help="Lengths of prompts in tokens, such as 8,512,4096")
    ] = "8,512",
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens decoded after the first")
    ] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Medians of so many rounds")] = 3,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Everything as JSON")
    ] = None,
    debug: Debug = False,
    *,
    settings: Settings,
) -> None:
    """Measure decoding, prefill and memory beside what the machine could do at most."""
    from cabochon.bench import measure

    counts, lengths = _numbers("--streams", streams), _numbers("--prompts", prompts)
    # What follows a random prompt repeats itself as no text does.
    if settings.draft_tokens is None and settings.drafter is None:
        settings = settings.model_copy(update={"draft_tokens": 0})
    start = time.perf_counter()
    with load(model, settings) as llm:
        found = measure(
            llm,
            time.perf_counter() - start,
            streams=counts,
            prompts=lengths,
            tokens=tokens,
            rounds=rounds,
        )
    print("\n".join(found.lines()))
    if as_json is not None:
        write_text(as_json, json.dumps(found.as_dict(), indent=2) + "\n")


def _numbers(flag: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise CabochonError(f"{flag} is {text!r}, expected numbers above 0 with commas between")
    return [int(part) for part in parts]
