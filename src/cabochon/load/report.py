"""What `inspect` prints and what a refusal says: the plan in numbers, each finding once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cabochon.checkpoint.folder import Checkpoint
from cabochon.config import ForeignArchitecture, KeptLayers, kept_layers, read_config
from cabochon.errors import LoadError
from cabochon.load.plan import Kind, LoadPlan, Problem, build_plan
from cabochon.load.tree import (
    AUDIO,
    AUDIO_PROJECTOR,
    EMBEDDER,
    HEAD,
    TEXT,
    VISION,
    VISION_PROJECTOR,
)

# First match of a site's canonical name.
_GROUPS = (
    (re.compile(rf"{re.escape(TEXT)}\.layers\.\d+\.self_attn\..+"), "attention"),
    (re.compile(rf"{re.escape(TEXT)}\.layers\.\d+\.mlp\..+"), "mlp"),
    (re.compile(rf"{re.escape(TEXT)}\.layers\.\d+\.router\..+"), "router"),
    (re.compile(rf"{re.escape(TEXT)}\.layers\.\d+\.experts\..+"), "experts"),
    (re.compile(rf"{re.escape(TEXT)}\.(layers\.\d+\.)?per_layer_.+"), "per-layer inputs"),
    (re.compile(rf"{re.escape(TEXT)}\.embed_tokens_per_layer"), "per-layer embeddings"),
    (re.compile(rf"{re.escape(TEXT)}\.embed_tokens"), "embeddings"),
    (re.compile(rf"{re.escape(HEAD)}"), "head"),
    (re.compile(rf"{re.escape(VISION)}\..+"), "vision tower"),
    (re.compile(rf"{re.escape(EMBEDDER)}\..+"), "vision embedder"),
    (re.compile(rf"{re.escape(VISION_PROJECTOR)}"), "vision projector"),
    (re.compile(rf"{re.escape(AUDIO)}\..+"), "audio tower"),
    (re.compile(rf"{re.escape(AUDIO_PROJECTOR)}"), "audio projector"),
)
_PARAMETERS = "norms and scalars"

MOST = 4  # findings of a kind, and names of a finding, that a terminal gets to see

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
    "SCHEME": "This version loads bf16, f16, f32, and int4 and int8 weights as llm-compressor's"
    " W4A16 and W8A16 store them (compressed-tensors, pack-quantized), and NVFP4 weights of its"
    " NVFP4A16 and of ModelOpt's W4A16_NVFP4.",
}


KV_DTYPES = {"bf16": 2, "f32": 4}  # bytes of a number in the cache, by the dtype that computes


@dataclass(frozen=True, slots=True)
class Row:
    """Matrices or parameters of one group that are stored alike."""

    group: str
    scheme: str
    bits: int
    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Finding:
    """The same thing said of several names, which are written as few patterns."""

    kind: str
    where: tuple[str, ...]
    count: int
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return {"where": list(self.where), "count": self.count, "detail": self.detail}


@dataclass(frozen=True, slots=True)
class Kept:
    """Keys and values that layers of one kind keep of all tokens, or of the last `window`."""

    kind: str
    layers: int
    window: int | None
    kv_heads: int
    head_dim: int
    elements_per_token: int

    @classmethod
    def of(cls, kept: KeptLayers) -> Kept:
        kind = "full" if kept.window is None else "sliding"
        sizes = (kept.window, kept.kv_heads, kept.head_dim, kept.elements)
        return cls(kind, len(kept.layers), *sizes)

    def as_dict(self) -> dict[str, Any]:
        """Bytes for each dtype keys and values may be kept in; `most` is None where it grows."""
        token = {name: self.elements_per_token * width for name, width in KV_DTYPES.items()}
        most = {name: size * self.window for name, size in token.items()} if self.window else None
        return {**asdict(self), "bytes_per_token": token, "most_bytes_per_sequence": most}


@dataclass(frozen=True, slots=True)
class Report:
    """The verdict on a checkpoint, made readable; of another architecture there is no plan."""

    folder: Path
    architecture: str
    plan: LoadPlan | None
    foreign: tuple[Problem, ...] = ()

    @property
    def loads(self) -> bool:
        return self.plan is not None and not self.plan.problems

    @property
    def groups(self) -> tuple[Row, ...]:
        """What would be read, in the order in which the model holds it."""
        sums: dict[tuple[str, str, int], list[int]] = {}
        for group, scheme, bits, nbytes in _stored(self.plan) if self.plan else ():
            total = sums.setdefault((group, scheme, bits), [0, 0])
            total[0] += 1
            total[1] += nbytes
        return tuple(Row(*key, count, nbytes) for key, (count, nbytes) in sums.items())

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What a sequence keeps of its tokens."""
        return tuple(map(Kept.of, kept_layers(self.plan.config.text))) if self.plan else ()

    @property
    def problems(self) -> tuple[Finding, ...]:
        found = self.plan.problems if self.plan else self.foreign
        return _findings((p.kind, p.where, p.count, p.detail) for p in found)

    @property
    def notes(self) -> tuple[Finding, ...]:
        found = self.plan.notes if self.plan else ()
        return _findings(("", note.where, 1, note.detail) for note in found)

    @property
    def dropped(self) -> tuple[Finding, ...]:
        found = self.plan.dropped if self.plan else ()
        return _findings(("", drop.where, 1, drop.reason) for drop in found)

    @property
    def nbytes(self) -> int:
        """Bytes that loading reads."""
        return self.plan.nbytes if self.plan else 0

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "verdict": "loads" if self.loads else "refused",
            "architecture": self.architecture,
            "head": "stored" if self.plan and self.plan.has_head else "token embeddings",
            "groups": [asdict(row) for row in self.groups],
            "kv_cache": [kept.as_dict() for kept in self.kept],
            "problems": [{"kind": f.kind, **f.as_dict()} for f in self.problems],
            "notes": [finding.as_dict() for finding in self.notes],
            "dropped": [finding.as_dict() for finding in self.dropped],
            "bytes": self.nbytes,
        }

    def text(self) -> str:
        """The report for a terminal: a refusal begins with its problems."""
        verdict = "loads" if self.loads else "refused"
        lines = [f"{self.folder}: {verdict} ({self.architecture})"]
        for kind, advice in _ADVICE.items():
            found = [finding for finding in self.problems if finding.kind == kind]
            if found:
                lines += ["", *(line for finding in found[:MOST] for line in _lines(finding))]
                if len(found) > MOST:
                    lines.append(f"  and {len(found) - MOST} more {kind} problems")
                lines.append(f"  {advice}")
        if self.loads:
            lines += ["", *_table(self.groups)]
            lines.append(f"  {_size(self.nbytes)} to read; head: {self.as_dict()['head']}")
            lines += ["", *_cache_table(self.kept)]
        for title, findings in (("dropped", self.dropped), ("notes", self.notes)):
            if findings:
                lines += ["", title, *(line for finding in findings for line in _lines(finding))]
        return "\n".join(lines)


def inspect_checkpoint(path: Path, *, weights_only: bool = False) -> Report:
    """The plan for the checkpoint folder `path`, from headers and configuration; reads no weights.

    With `weights_only`, what a recipe does to activations is left out.

    Raises:
        UnreadableError: there is no checkpoint that could be judged.
    """
    path = Path(path)
    checkpoint = Checkpoint.open(path)
    try:
        config, raw = read_config(path)
    except ForeignArchitecture as error:
        problem = Problem("FOREIGN", "config.json", str(error))
        return Report(path, error.architecture, None, (problem,))
    plan = build_plan(checkpoint, config, raw, weights_only=weights_only)
    return Report(path, config.architecture, plan)


def plan_checkpoint(path: Path, *, weights_only: bool = False) -> Report:
    """The report on a checkpoint that loads, with its plan; what else it needs can be read next.

    Raises:
        UnreadableError: there is no checkpoint that could be judged.
        LoadError: it would not load exactly right; the text is the report.
    """
    report = inspect_checkpoint(path, weights_only=weights_only)
    if not report.loads:
        raise LoadError(report.text())
    return report


def _stored(plan: LoadPlan) -> Iterator[tuple[str, str, int, int]]:
    for site in plan.sites:
        yield _group(site.site.name), site.stored_as, site.scheme.bits, site.nbytes
    for read in plan.parameters:
        dtype = read.tensor.dtype
        yield _PARAMETERS, dtype.lower(), 32 if dtype == "F32" else 16, read.tensor.nbytes


def _group(name: str) -> str:
    return next(group for pattern, group in _GROUPS if pattern.fullmatch(name))


def _findings(entries: Iterable[tuple[str, str, int, str]]) -> tuple[Finding, ...]:
    """Entries (kind, where, count, detail) with the same kind and detail become one finding."""
    merged: dict[tuple[str, str], tuple[list[str], list[int]]] = {}
    for kind, where, count, detail in entries:
        names, counts = merged.setdefault((kind, detail), ([], []))
        names.append(where)
        counts.append(count)
    return tuple(
        Finding(kind, collapse(names), sum(counts), detail)
        for (kind, detail), (names, counts) in merged.items()
    )


def collapse(names: Iterable[str]) -> tuple[str, ...]:
    """`names` with numbered components written as ranges: `layers.{0-3,7}.mlp.up_proj`.

    Names that differ in several numbers are collapsed in the first of them only.
    """
    templates: dict[tuple[str, str], list[int]] = {}
    plain: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if at is None:
            plain[name] = None
        else:
            key = (".".join(parts[:at]), ".".join(parts[at + 1 :]))
            templates.setdefault(key, []).append(int(parts[at]))
    collapsed = [
        ".".join(filter(None, (before, _ranges(numbers), after)))
        for (before, after), numbers in templates.items()
    ]
    return (*plain, *collapsed)


def _ranges(numbers: Sequence[int]) -> str:
    """`{0-3,7}` of 0, 1, 2, 3, 7; a single number as it is."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(str(end) for end in run) for run in runs)
    return text if text.isdecimal() else f"{{{text}}}"


def _lines(finding: Finding) -> Iterator[str]:
    more = len(finding.where) - MOST
    kind = f"{finding.kind:<8}" if finding.kind else ""
    times = f"  x{finding.count}" if finding.count > 1 else ""
    for i, where in enumerate(finding.where[:MOST]):
        yield f"  {kind if i == 0 else ' ' * len(kind)}{where}{times if i == 0 else ''}"
    if more > 0:
        yield f"  {' ' * len(kind)}and {more} more like these"
    yield f"    {' ' * len(kind)}{finding.detail}"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield f"  {'group':<22}{'scheme':<24}{'bits':>4}{'count':>8}{'bytes':>12}"
    for row in rows:
        yield f"  {row.group:<22}{row.scheme:<24}{row.bits:>4}{row.count:>8}{_size(row.bytes):>12}"


def _cache_table(rows: Sequence[Kept]) -> Iterator[str]:
    yield f"  {'keys and values':<22}{'heads x size':<24}{'':>4}{'bf16':>8}{'f32':>12}"
    for row in rows:
        name = f"{row.layers} {row.kind} layers"
        shape = f"{row.kv_heads} x {row.head_dim}"
        token = row.as_dict()["bytes_per_token"]
        sizes = f"{_size(token['bf16']):>12}{_size(token['f32']):>12}"
        kept = "of all tokens" if row.window is None else f"of the last {row.window} tokens"
        yield f"  {name:<22}{shape:<24}{sizes} a token, {kept}"


def _size(count: int) -> str:
    """Decimal units, as file managers and download pages print them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
