"""`cabochon inspect`: whether and how a checkpoint loads, told from its headers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cabochon.cli.model import given
from cabochon.cli.options import Debug, Model
from cabochon.errors import CabochonError

if TYPE_CHECKING:
    from cabochon.load.certificate import Certificate
    from cabochon.load.report import Report


def inspect(
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON")] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Every stored tensor and its place")
    ] = False,
    card: Annotated[bool, typer.Option("--card", help="A Markdown table for a model card")] = False,
    certificate: Annotated[
        bool, typer.Option("--certificate", help="Read all weights, and tell what they look like")
    ] = False,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave activations as they are")
    ] = False,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="CODE", help="What an error code means")
    ] = None,
    debug: Debug = False,
) -> None:
    """Tell from headers alone whether and how a checkpoint loads."""
    if explain is not None:
        from cabochon.load.explain import explain as text_of

        print(text_of(explain))
        return
    if sum((tensors, card, certificate)) > 1 or (card and as_json):
        raise CabochonError("--tensors, --card and --certificate exclude each other")
    from cabochon.load.obtain import inspect_model

    report = inspect_model(given(model), weights_only=weights_only)
    seen = _certificate(report) if certificate and report.loads else None
    print(_json(report, seen, tensors) if as_json else _text(report, seen, tensors, card))
    if not report.loads:
        raise typer.Exit(1)


def _json(report: Report, seen: Certificate | None, tensors: bool) -> str:
    from cabochon.load.places import places

    found: dict[str, Any] = report.as_dict()
    if tensors:
        rows = places(report.checkpoint.tensors, report.plan)
        found["tensors"] = [row.as_dict() for row in rows]
    if seen is not None:
        found["certificate"] = seen.as_dict()
    return json.dumps(found, indent=2)


def _text(report: Report, seen: Certificate | None, tensors: bool, card: bool) -> str:
    from cabochon.load.card import card as card_of
    from cabochon.load.places import places, table

    if card:
        return card_of(report)
    if tensors:
        return "\n".join(table(places(report.checkpoint.tensors, report.plan)))
    return report.text() if seen is None else f"{report.text()}\n\n{seen.text()}"


def _certificate(report: Report) -> Certificate:
    """All that a load would see, from every entry."""
    from cabochon.cli.model import progress_bar
    from cabochon.load.certify import certify

    report.require_weights()
    assert report.plan is not None
    with progress_bar("reading") as told:
        return certify(report.plan, thorough=True, progress=told)
