"""The report for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cabochon.load.findings import MOST, Finding
from cabochon.load.forecast import KV_DTYPES, Forecast, Kept
from cabochon.load.groups import HighPrecision, Row
from cabochon.load.identity import Identity
from cabochon.load.plan import Kind
from cabochon.quant.families import FAMILIES

if TYPE_CHECKING:
    from cabochon.load.report import Report

_ADVICE: Mapping[Kind, str] = {
    "FOREIGN": "Only models of the Gemma 4 family that write text are run.",
    "CONFIG": "config.json and the weights are not of the same model.",
    "UNUSED": "Every stored tensor must have a place, since ignoring one can change what the model"
    " says. Check that config.json belongs to these weights.",
    "MISSING": "The file lacks what the model needs. Check that the download is complete and that"
    " config.json belongs to these weights.",
    "TWICE": "Two stored names mean the same tensor. Remove one spelling.",
    "SHAPE": "Check that config.json and the weights are of the same model.",
    "DTYPE": "Stored bits are never reinterpreted. Export the tensor as bf16, f16 or f32.",
    "SCHEME": "This version loads bf16, f16 and f32, and what is quantized as these do:"
    f" {', '.join(family.name for family in FAMILIES)} (docs/formats.md).",
}


def printed(report: Report) -> str:
    """All that `report` says, a refusal's problems first."""
    lines = [f"{report.source}: {report.verdict} ({report.architecture})"]
    lines += _problems(report.problems)
    lines += ["", *_about(report)]
    if report.loads:
        lines += ["", *_table(report.groups)]
        lines.append(f"  {size(report.nbytes)} to read; head: {report.head}")
        lines += _high_precision(report.high_precision)
        if report.kept:
            lines += ["", *_cache_table(report.kept)]
    if report.forecast is not None:
        lines += ["", *_memory(report.forecast)]
    for title, found in (("dropped", report.dropped), ("notes", report.notes)):
        if found:
            lines += ["", title, *(line for finding in found for line in finding.lines())]
    if report.executables:
        lines += ["", "ignored, never run"]
        lines += [f"  {found.where}  {found.what}" for found in report.executables]
    return "\n".join(lines)


def size(count: int) -> str:
    """Decimal units, as file managers and download pages print them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def _problems(problems: Sequence[Finding]) -> Iterator[str]:
    for kind, advice in _ADVICE.items():
        found = [finding for finding in problems if finding.kind == kind]
        if found:
            yield ""
            for finding in found[:MOST]:
                yield from finding.lines()
            if len(found) > MOST:
                yield f"  and {len(found) - MOST} more {kind} problems"
            yield f"  {advice} More: cabochon inspect --explain {kind}"


def _about(report: Report) -> Iterator[str]:
    if report.identity is not None:
        yield f"  model        {describe(report.identity)}"
    yield f"  producer     {report.producer.name}"
    for line in report.producer.evidence:
        yield f"               {line}"
    if report.loads:
        yield f"  activations  {report.activations}"
        yield f"  plan         {report.hash}"


def describe(identity: Identity) -> str:
    """One line on a model."""
    moving = identity.parameters - identity.tables
    active = f", {_count(identity.active)} active" if identity.active < moving else ""
    tables = f" of them {_count(identity.tables)} in tables{active}"
    takes = f"; takes {', '.join(identity.takes)}" if identity.takes else ""
    return (
        f"{identity.name}: {_count(identity.parameters)} parameters,{tables};"
        f" {identity.layers} layers of {identity.hidden_size:,}{takes}; context"
        f" {identity.context:,}"
    )


def _count(number: int) -> str:
    for unit, scale in (("billion", 10**9), ("million", 10**6)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:,}"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    width = max(22, *(len(row.scheme) for row in rows)) + 2
    yield f"  {'group':<22}{'scheme':<{width}}{'bits':>4}{'in all':>8}{'count':>8}{'bytes':>12}"
    for row in rows:
        each = f"{row.as_dict()['bits_per_weight']:.2f}"
        left = f"  {row.group:<22}{row.scheme:<{width}}{row.bits:>4}{each:>8}"
        yield f"{left}{row.count:>8}{size(row.bytes):>12}"


def _high_precision(kept: Sequence[HighPrecision]) -> Iterator[str]:
    whole = [f"{row.group} ({row.scheme})" for row in kept if row.whole]
    if whole:
        yield f"  in high precision: {', '.join(whole)}"
    for row in kept:
        if not row.whole:
            names = ", ".join(row.where[:MOST]) + (" ..." if len(row.where) > MOST else "")
            yield f"  in high precision of {row.group} ({row.scheme}, {row.count}): {names}"


def _cache_table(rows: Sequence[Kept]) -> Iterator[str]:
    yield f"  {'keys and values':<22}{'heads x size':<24}{'':>4}{'bf16':>8}{'f32':>12}"
    for row in rows:
        name = f"{row.layers} {row.kind} layers"
        shape = f"{row.kv_heads} x {row.head_dim}"
        token = row.as_dict()["bytes_per_token"]
        sizes = f"{size(token['bf16']):>12}{size(token['f32']):>12}"
        kept = "of all tokens" if row.window is None else f"of the last {row.window} tokens"
        yield f"  {name:<22}{shape:<24}{sizes} a token, {kept}"


def _memory(forecast: Forecast) -> Iterator[str]:
    found = forecast.as_dict()
    weights, program = size(forecast.weights), size(found["program_bytes"])
    yield f"  memory: {weights} weights, {program} program; here are {size(forecast.machine)}"
    for name in KV_DTYPES:
        grows = size(found["kv_bytes_per_1000_tokens"][name])
        window = size(found["kv_window_bytes"][name])
        most = found["largest_context"][name]
        fits = f"{most:,} tokens fit" if most else "does not fit"
        whole = ", all that the model knows" if most == found["model_context"] else ""
        yield f"    keys in {name}: {grows} per 1,000 tokens, windows {window}: {fits}{whole}"
