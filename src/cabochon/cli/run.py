"""`cabochon run`: an answer to one prompt, or a conversation."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cabochon.cli.model import load
from cabochon.cli.options import Debug, Model, with_flags
from cabochon.flags import with_settings
from cabochon.settings import EngineSettings, Settings

if TYPE_CHECKING:
    from cabochon.conversation import Medium


def _file(name: str, help: str) -> Any:
    return typer.Option(name, metavar="FILE", help=f"{help}; may be repeated")


def _sampling(name: str, help: str) -> Any:
    return typer.Option(name, help=help, rich_help_panel="Sampling", show_default=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Files:
    """What a prompt shows beside its words."""

    image: Annotated[list[Path] | None, _file("--image", "A picture")] = None
    audio: Annotated[list[Path] | None, _file("--audio", "A sound: WAV, FLAC, MP3 or Ogg")] = None
    video: Annotated[list[Path] | None, _file("--video", "A video")] = None

    def open(self) -> list[Medium]:
        from cabochon.conversation import open_medium

        return [
            *(open_medium("image", path) for path in self.image or ()),
            *(open_medium("audio", path) for path in self.audio or ()),
            *(open_medium("video", path) for path in self.video or ()),
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """What replaces the checkpoint's own defaults; None leaves them."""

    max_tokens: Annotated[int | None, _sampling("--max-tokens", "Length of an answer")] = None
    temperature: Annotated[float | None, _sampling("--temperature", "0 takes the likeliest")] = None
    top_k: Annotated[int | None, _sampling("--top-k", "Draw from the likeliest K; 0: all")] = None
    top_p: Annotated[float | None, _sampling("--top-p", "Draw from this much probability")] = None
    min_p: Annotated[float | None, _sampling("--min-p", "Least share of the likeliest's")] = None
    seed: Annotated[int | None, _sampling("--seed", "Draw the same answer again")] = None

    def changes(self) -> dict[str, Any]:
        return {name: v for name, v in dataclasses.asdict(self).items() if v is not None}


@with_settings(EngineSettings)
@with_flags("files", Files)
@with_flags("sampling", Sampling)
def run(
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and end; a chat without it")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Plan and speed, on stderr")
    ] = False,
    debug: Debug = False,
    *,
    files: Files,
    sampling: Sampling,
    settings: Settings,
) -> None:
    """Answer a prompt, or chat."""
    from cabochon.conversation import Conversation, converse
    from cabochon.engine.request import SamplingParams

    changes = sampling.changes()
    SamplingParams(**changes)  # raises before a long load, not after it
    media = files.open()
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr)
    with load(model, settings) as llm:
        if verbose:
            print(llm.told(), file=sys.stderr)
        params = dataclasses.replace(llm.defaults, **changes)
        conversation = Conversation(llm, params, system=system, verbose=verbose)
        for medium in media:
            conversation.attach(medium)
        if prompt is None:
            raise typer.Exit(converse(conversation))
        conversation.say(prompt)
