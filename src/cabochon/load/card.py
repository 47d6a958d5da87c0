"""A Markdown table on how a checkpoint is stored, for its publisher to paste into a model card."""

from __future__ import annotations

from collections.abc import Iterator

from cabochon.load.printed import describe, size
from cabochon.load.report import Report


def card(report: Report) -> str:
    """Modules, schemes, bits and bytes; what is kept as floats; keys and values."""
    lines = ["## Quantization", "", *_facts(report), "", *_groups(report)]
    kept = [f"{row.group} ({', '.join(f'`{n}`' for n in row.where)})" if not row.whole
            else row.group for row in report.high_precision]  # fmt: skip
    if kept:
        lines += ["", f"Kept in high precision: {'; '.join(kept)}."]
    lines += ["", *_cache(report), ""]
    verdict = "loads exactly" if report.loads else "is refused"
    hashed = f"; plan `{report.hash}`" if report.hash else ""
    lines.append(f"`cabochon inspect` reads from the headers that it {verdict}{hashed}.")
    return "\n".join(lines)


def _facts(report: Report) -> Iterator[str]:
    if report.identity is not None:
        yield f"- {describe(report.identity)}"
    yield f"- {report.architecture}, quantized with: {report.producer.name}"
    yield f"- activations: {report.activations}"


def _groups(report: Report) -> Iterator[str]:
    yield "| modules | stored as | bits | bits with scales | matrices | bytes |"
    yield "|---|---|---:|---:|---:|---:|"
    for row in report.groups:
        each = row.as_dict()["bits_per_weight"]
        cells = (row.group, row.scheme, row.bits, f"{each:.2f}", row.count, size(row.bytes))
        yield f"| {' | '.join(map(str, cells))} |"
    yield f"| **all** | | | {_average(report)} | | {size(report.nbytes)} |"


def _average(report: Report) -> str:
    parameters = sum(row.parameters for row in report.groups)
    return f"{8 * report.nbytes / parameters:.2f}" if parameters else ""


def _cache(report: Report) -> Iterator[str]:
    for kept in report.kept:
        token = kept.as_dict()["bytes_per_token"]["bf16"]
        of = "of all tokens" if kept.window is None else f"of the last {kept.window}"
        yield f"- keys and values of {kept.layers} {kept.kind} layers: {size(token)} a token in"\
              f" bf16, {of}"  # fmt: skip
