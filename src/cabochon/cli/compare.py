"""`cabochon compare`: what weights show of themselves, and what they lost."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from cabochon.cli.model import obtained, progress_bar
from cabochon.cli.options import Debug
from cabochon.files import write_text


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint")],
    original: Annotated[
        str | None,
        typer.Argument(metavar="[ORIGINAL]", help="What it was made from, or another of its kind"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="The report as a page")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="The report as JSON")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare weights, site by site; no model is run."""
    from cabochon.verify.comparison import compare_checkpoints

    path, other = obtained(model), None if original is None else obtained(original)
    with progress_bar("comparing") as progress:
        found = compare_checkpoints(path, other, progress)
    print(found.text())
    if as_json is not None:
        write_text(as_json, json.dumps(found.as_dict(), indent=2) + "\n")
    if html is not None:
        write_text(html, found.page(shlex.join(["cabochon", *sys.argv[1:]])))
