"""The commands put together, and what becomes of their errors."""

from __future__ import annotations

import gc
import sys
import traceback
from typing import Annotated

import typer

from cabochon import __version__
from cabochon.cli.bench import bench
from cabochon.cli.compare import compare
from cabochon.cli.eval import evaluate
from cabochon.cli.inspect import inspect
from cabochon.cli.options import State
from cabochon.cli.run import run
from cabochon.cli.serve import serve
from cabochon.cli.verify import verify
from cabochon.errors import CabochonError, LoadError, MismatchError, ResourceError
from cabochon.flags import SETTINGS_HELP

FAULT = 70
INTERRUPTED = 130

# How many objects are made before Python looks for garbage among them. By its own measure of 700 it
# looks through all that torch makes again and again, for a fifth of the time that importing takes.
_SELDOM = (50_000, 20, 20)

app = typer.Typer(
    name="cabochon",
    help="Runs quantized Gemma 4 right: a checkpoint loads exactly, or is refused by name.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


# In the order of `--help`.
app.command(epilog=SETTINGS_HELP)(run)
app.command(epilog=SETTINGS_HELP)(serve)
app.command()(inspect)
app.command()(verify)
app.command()(compare)
app.command(epilog=SETTINGS_HELP)(bench)
app.command("eval", epilog=SETTINGS_HELP)(evaluate)


def main() -> None:
    """The entry point: runs a command and ends the process with its status."""
    gc.set_threshold(*_SELDOM)
    state = State()
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
        _fail(f"{error}{_more(error)}")
        sys.exit(error.exit_code)
    except Exception as error:
        if state.debug:
            traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}\nThis is a fault of cabochon; --debug shows where.")
        sys.exit(FAULT)


def _more(error: CabochonError) -> str:
    """Where the long form of an error is; the report of a refused plan says so by itself."""
    code = "MEMORY" if isinstance(error, ResourceError) else "VALUE"
    explained = isinstance(error, ResourceError | LoadError)
    if not explained or isinstance(error, MismatchError) or "--explain" in str(error):
        return ""
    return f"\nMore: cabochon inspect --explain {code}"


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
