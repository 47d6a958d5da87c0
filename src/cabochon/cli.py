"""The `cabochon` command. Data goes to stdout, everything said to a person to stderr.

Exit status: 0 done; 1 the checkpoint is refused; 2 wrong usage, or something that cannot be read
or served; 3 too little memory; 70 a fault of ours; 130 interrupted. torch and FastAPI are imported
by the commands that need them, so that `--help`, `--version` and `inspect` start at once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cabochon import __version__
from cabochon.errors import CabochonError
from cabochon.files import DEMO
from cabochon.flags import SETTINGS_HELP, with_settings
from cabochon.settings import EngineSettings, Settings, variable

if TYPE_CHECKING:
    from cabochon.llm import LLM

FAULT = 70
INTERRUPTED = 130

app = typer.Typer(
    name="cabochon",
    help="Runs quantized Gemma 4 right: a checkpoint loads exactly, or is refused by name.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@dataclasses.dataclass(slots=True)
class _State:
    debug: bool = False


def _set_debug(context: typer.Context, value: bool) -> None:
    if value:
        context.ensure_object(_State).debug = True


Model = Annotated[
    Path | None,
    typer.Argument(
        metavar="[MODEL]", help="Checkpoint folder; the demo without it", show_default=False
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks of errors", callback=_set_debug)
]


def _sampling(name: str, help: str) -> Any:
    return typer.Option(name, help=help, rich_help_panel="Sampling", show_default=False)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version")] = False,
) -> None:
    if version:
        print(f"cabochon {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


@app.command(epilog=SETTINGS_HELP)
@with_settings(EngineSettings)
def run(
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and end; a chat without it")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", metavar="FILE", help="A picture; may be repeated"),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option(
            "--audio", metavar="FILE", help="A sound: WAV, FLAC, MP3 or Ogg; may be repeated"
        ),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option("--video", metavar="FILE", help="A video; may be repeated"),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message")] = None,
    max_tokens: Annotated[int | None, _sampling("--max-tokens", "Length of an answer")] = None,
    temperature: Annotated[
        float | None, _sampling("--temperature", "0 takes the likeliest")
    ] = None,
    top_k: Annotated[int | None, _sampling("--top-k", "Draw from the likeliest K; 0: all")] = None,
    top_p: Annotated[float | None, _sampling("--top-p", "Draw from this much probability")] = None,
    min_p: Annotated[float | None, _sampling("--min-p", "Least share of the likeliest's")] = None,
    seed: Annotated[int | None, _sampling("--seed", "Draw the same answer again")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Plan and speed, on stderr")
    ] = False,
    debug: Debug = False,
    *,
    settings: Settings,
) -> None:
    """Answer a prompt, or chat."""
    from cabochon.conversation import Conversation, converse, open_medium
    from cabochon.engine.request import SamplingParams

    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    SamplingParams(**changes)  # raises before a long load, not after it
    media = [
        *(open_medium("image", path) for path in image or ()),
        *(open_medium("audio", path) for path in audio or ()),
        *(open_medium("video", path) for path in video or ()),
    ]
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr)
    with _load(model, settings) as llm:
        if verbose:
            print(llm.report.text(), file=sys.stderr)
        params = dataclasses.replace(llm.defaults, **changes)
        conversation = Conversation(llm, params, system=system, verbose=verbose)
        for medium in media:
            conversation.attach(medium)
        if prompt is None:
            raise typer.Exit(converse(conversation))
        conversation.say(prompt)


@app.command(epilog=SETTINGS_HELP)
@with_settings(Settings)
def serve(model: Model = None, debug: Debug = False, *, settings: Settings) -> None:
    """Serve an OpenAI-compatible API."""
    settings.check_exposure()
    from cabochon.serve import server

    # Bound before the model is read: a port that is taken should not cost a minute to find out.
    with server.bind(settings.host, settings.port) as listener, _load(model, settings) as llm:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        print(f"{llm.report.text()}\n\n{llm.capacity}", file=sys.stderr)

        def ready() -> None:
            print(
                f"ready: {url}\n\n{_curl(url, llm.name, settings)}\n", file=sys.stderr, flush=True
            )

        server.serve(llm, settings, listener, ready)


def _curl(url: str, name: str, settings: Settings) -> str:
    body = {"model": name, "messages": [{"role": "user", "content": "Who are you?"}]}
    key = f' -H "authorization: Bearer ${variable("api_key")}"' if settings.api_key else ""
    return (
        f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json'"
        f" -d {shlex.quote(json.dumps(body))}"
    )


@app.command()
def inspect(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON")] = False,
    debug: Debug = False,
) -> None:
    """Tell from headers alone whether and how a checkpoint loads."""
    from cabochon.load.report import inspect_checkpoint

    report = inspect_checkpoint(_folder(model))
    found = report.as_dict()
    print(json.dumps(found, indent=2) if as_json else report.text())
    if found["verdict"] != "loads":
        raise typer.Exit(1)


def _folder(model: Path | None) -> Path:
    if model is not None:
        return model
    print("no MODEL given: using the demo that comes with cabochon", file=sys.stderr)
    return DEMO


def _load(model: Path | None, settings: Settings) -> LLM:
    from cabochon.llm import LLM

    _folder(model)
    with _progress() as progress:
        return LLM(model, **settings.engine_options(), progress=progress)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar at a terminal; elsewhere a line every few seconds of a load that takes long."""
    if not sys.stderr.isatty():
        yield _LoadLines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _LoadLines:
    SECONDS = 5.0

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._said >= self.SECONDS:
            self._said = time.monotonic()
            print(f"loading: {done / 2**30:.1f} of {total / 2**30:.1f} GiB", file=sys.stderr)


def main() -> None:
    """The entry point: runs a command and ends the process with its status."""
    state = _State()
    try:
        sys.exit(app(obj=state, standalone_mode=False) or 0)
    except typer.TyperException as error:
        _fail(f"{error.format_message()}\nFor more information, try 'cabochon --help'.")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(INTERRUPTED)
    except CabochonError as error:
        if state.debug:
            traceback.print_exc()
        _fail(str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if state.debug:
            traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}\nThis is a fault of cabochon; --debug shows where.")
        sys.exit(FAULT)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
