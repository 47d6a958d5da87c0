"""`cabochon verify`: is a checkpoint that loads also right?"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cabochon.cli.model import given, obtained, progress_bar
from cabochon.cli.options import Debug, Model
from cabochon.files import write_text


def verify(
    model: Model = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="ORIGINAL", help="What it was made from"),
    ] = None,
    reference: Annotated[
        Literal["ours", "transformers"],
        typer.Option(
            "--reference", help="Whose arithmetic is right; transformers finds faults of ours"
        ),
    ] = "ours",
    to_the_end: Annotated[
        bool, typer.Option("--to-the-end", help="Go on after a stage that failed")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="The report as a page")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="The report as JSON")
    ] = None,
    debug: Debug = False,
) -> None:
    """Verify a checkpoint: by itself, and against its original."""
    from cabochon.verify.render import page, text
    from cabochon.verify.verification import verify

    path, original = obtained(given(model)), None if against is None else obtained(against)
    with progress_bar("verifying") as progress:
        found = verify(
            path, original, reference=reference, to_the_end=to_the_end, progress=progress
        )
    print(text(found))
    if as_json is not None:
        write_text(as_json, json.dumps(found.as_dict(), indent=2) + "\n")
    if html is not None:
        write_text(html, page(found, shlex.join(["cabochon", *sys.argv[1:]])))
    if not found.passed:
        raise typer.Exit(1)
