"""`cabochon eval`: how many answers are right, and whether a difference means anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cabochon.cli.model import counter, load
from cabochon.cli.options import Debug
from cabochon.errors import CabochonError
from cabochon.files import check_writable, write_text
from cabochon.flags import with_settings
from cabochon.settings import EngineSettings, Settings

if TYPE_CHECKING:
    from cabochon.evaluate.run import Subject


@with_settings(EngineSettings)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Checkpoints: folders or files, or org/name[@revision]"
        ),
    ],
    task: Annotated[
        str, typer.Option("--task", help="gsm8k, screenspot-pro, questions or perplexity")
    ],
    data: Annotated[Path, typer.Option("--data", metavar="PATH", help="The task's file or folder")],
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Take the first so many questions, or windows of text"),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Length of an answer")
    ] = 1024,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let the model think first")] = False,
    each_activations: Annotated[
        bool,
        typer.Option(
            "--each-activations", help="Each model with float32, int16 and int8 activations in turn"
        ),
    ] = False,
    divergence: Annotated[
        bool,
        typer.Option(
            "--divergence",
            help="Also how far the others' probabilities are from the first's, over its answers;"
            " two models are in memory together",
        ),
    ] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Scores and answers as JSON")
    ] = None,
    debug: Debug = False,
    *,
    settings: Settings,
) -> None:
    """Evaluate checkpoints on a task; the first is what the others are compared with."""
    from cabochon.engine.request import SamplingParams
    from cabochon.evaluate.divergence import divergences, table_of
    from cabochon.evaluate.results import Accuracy, text_of
    from cabochon.evaluate.run import TASK_NAMES, evaluate

    if task not in TASK_NAMES:
        raise CabochonError(f"--task is {task!r}, expected one of {', '.join(TASK_NAMES)}")
    _check_answers(task, divergence, settings)
    if as_json is not None:
        check_writable(as_json)
    subjects = _subjects(models, settings, each_activations)
    found = evaluate(
        subjects,
        task,
        data,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        limit=limit,
        thinking=thinking,
        watch=counter,
    )
    print("\n\n".join(map(text_of, found.tables())))
    report = found.as_dict()
    if divergence and isinstance(found, Accuracy):
        apart = list(divergences(subjects, found, thinking=thinking, watch=counter))
        print(f"\n{text_of(table_of(apart))}")
        report["divergences"] = [one.as_dict() for one in apart]
    if as_json is not None:
        write_text(as_json, json.dumps(report, indent=2) + "\n")


def _check_answers(task: str, divergence: bool, settings: EngineSettings) -> None:
    """Of perplexity there are none, for what needs answers."""
    for option, given in (("--divergence", divergence), ("--drafter", settings.drafter)):
        if given and task == "perplexity":
            raise CabochonError(f"{option} is about answers, and perplexity has none")


def _subjects(models: Sequence[str], settings: Settings, each: bool) -> list[Subject]:
    from cabochon.evaluate.run import Subject
    from cabochon.kernels.packed import ACTIVATIONS

    modes = reversed(ACTIVATIONS) if each else (settings.activations,)
    chosen = [(settings.model_copy(update={"activations": mode}), mode) for mode in modes]
    return [
        Subject(f"{model}, {mode}" if each else model, partial(load, model, variant))
        for model in models
        for variant, mode in chosen
    ]
