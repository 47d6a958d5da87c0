"""`cabochon eval`: how many answers are right, and whether a difference means anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cabochon.cli.model import load
from cabochon.cli.options import Debug
from cabochon.console import tell
from cabochon.files import write_text
from cabochon.flags import with_settings
from cabochon.settings import EngineSettings, Settings


@with_settings(EngineSettings)
def evaluate(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="Checkpoints")],
    task: Annotated[
        str, typer.Option("--task", help="gsm8k, screenspot-pro, pictures or perplexity")
    ],
    data: Annotated[Path, typer.Option("--data", metavar="PATH", help="The task's file or folder")],
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Take the first so many questions")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Length of an answer")
    ] = 1024,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think first")] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Scores and answers as JSON")
    ] = None,
    debug: Debug = False,
    *,
    settings: Settings,
) -> None:
    """Evaluate checkpoints on a task; the first is what the others are compared with."""
    from cabochon.engine.request import SamplingParams
    from cabochon.errors import CabochonError
    from cabochon.evaluate.results import text_of
    from cabochon.evaluate.run import TASK_NAMES, evaluate

    if task not in TASK_NAMES:
        raise CabochonError(f"--task is {task!r}, expected one of {', '.join(TASK_NAMES)}")
    found = evaluate(
        models,
        task,
        data,
        load=lambda path: load(str(path), settings),
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        limit=limit,
        thinking=thinking,
        progress=lambda name, done, count: tell(f"{name}: {done} of {count} answered"),
    )
    print(text_of(found.table()))
    if as_json is not None:
        write_text(as_json, json.dumps(found.as_dict(), indent=2) + "\n")
