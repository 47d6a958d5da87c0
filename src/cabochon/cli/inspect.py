"""`cabochon inspect`: whether and how a checkpoint loads, told from its headers."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cabochon.cli.model import folder
from cabochon.cli.options import Debug, Model


def inspect(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON")] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave activations as they are")
    ] = False,
    debug: Debug = False,
) -> None:
    """Tell from headers alone whether and how a checkpoint loads."""
    from cabochon.load.report import inspect_checkpoint

    report = inspect_checkpoint(folder(model), weights_only=weights_only)
    found = report.as_dict()
    print(json.dumps(found, indent=2) if as_json else report.text())
    if found["verdict"] != "loads":
        raise typer.Exit(1)
