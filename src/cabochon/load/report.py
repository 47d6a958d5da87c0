"""What `inspect` finds and what a refusal says: the plan in numbers, each finding once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cabochon.checkpoint.folder import Checkpoint, Sizes
from cabochon.config import DRAFTERS, ForeignArchitecture, kept_layers
from cabochon.errors import LoadError, MismatchError, UnreadableError
from cabochon.files import read_json_object
from cabochon.load.describe import describe
from cabochon.load.executables import Executable, executables
from cabochon.load.findings import Finding, findings
from cabochon.load.fingerprint import plan_hash
from cabochon.load.forecast import Forecast, Kept, machine_memory
from cabochon.load.groups import HighPrecision, Row, high_precision, rows_of
from cabochon.load.identity import Identity
from cabochon.load.plan import LoadPlan, Problem
from cabochon.load.planner import build_plan
from cabochon.load.printed import printed
from cabochon.load.producer import Producer, producer_of, producer_of_gguf
from cabochon.quant.configs import read_rules

SCHEMA = 1  # of the JSON; report.schema.json describes it


@dataclass(frozen=True, slots=True)
class Report:
    """The verdict on a checkpoint, made readable; of another architecture there is no plan."""

    folder: Path
    source: str  # as whoever asked called it
    architecture: str
    checkpoint: Checkpoint
    producer: Producer
    executables: tuple[Executable, ...]
    weights_only: bool
    recipe: tuple[str, ...]  # what is done to activations, or with `weights_only` would be
    plan: LoadPlan | None
    hash: str | None = None  # of the plan; None of what is refused
    foreign: tuple[Problem, ...] = ()

    @property
    def loads(self) -> bool:
        return self.plan is not None and not self.plan.problems

    @property
    def verdict(self) -> str:
        return "loads" if self.loads else "refused"

    @property
    def groups(self) -> tuple[Row, ...]:
        """What would be read, in the order in which the model holds it."""
        return rows_of(self.plan) if self.plan else ()

    @property
    def high_precision(self) -> tuple[HighPrecision, ...]:
        return high_precision(self.plan) if self.plan else ()

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What a sequence keeps of its tokens."""
        return tuple(map(Kept.of, kept_layers(self.plan.config.text))) if self.plan else ()

    @property
    def is_drafter(self) -> bool:
        return self.plan is not None and self.plan.config.drafting is not None

    @property
    def identity(self) -> Identity | None:
        return Identity.of(self.plan.config, has_head=self.plan.has_head) if self.plan else None

    @property
    def forecast(self) -> Forecast | None:
        """Of the machine that asks. A refused plan does not say what would be read.

        A drafter needs what its target needs, and its own weights.
        """
        if self.plan is None or not self.loads or self.is_drafter:
            return None
        return Forecast.of(self.plan, machine_memory())

    @property
    def head(self) -> str:
        return "stored" if self.plan and self.plan.has_head else "token embeddings"

    @property
    def activations(self) -> str:
        """What becomes of activations, and why."""
        if not self.recipe:
            return "not quantized"
        names = ", ".join(self.recipe)
        if self.weights_only:
            return f"not quantized: --weights-only leaves out the recipe's {names}"
        return f"{names}, as the recipe says; --weights-only leaves it out"

    @property
    def problems(self) -> tuple[Finding, ...]:
        found = self.plan.problems if self.plan else self.foreign
        return findings((p.kind, p.where, p.count, p.detail) for p in found)

    @property
    def notes(self) -> tuple[Finding, ...]:
        found = self.plan.notes if self.plan else ()
        return findings(("", note.where, 1, note.detail) for note in found)

    @property
    def dropped(self) -> tuple[Finding, ...]:
        found = self.plan.dropped if self.plan else ()
        return findings(("", drop.where, 1, drop.reason) for drop in found)

    @property
    def nbytes(self) -> int:
        """Bytes that loading reads."""
        return self.plan.nbytes if self.plan else 0

    def require_weights(self) -> None:
        """`UnreadableError` if there are headers here and no weights."""
        if self.checkpoint.saved_headers:
            raise UnreadableError(
                f"{self.source} holds headers without their tensors: they can be inspected, not"
                " loaded"
            )

    def require_model(self) -> None:
        """`MismatchError` if this is a drafter."""
        if self.is_drafter:
            raise MismatchError(
                f"{self.source} is a drafter, which guesses for a larger model and answers nobody"
                " by itself: to run or serve, name it with --drafter beside that model"
            )

    def require_drafter(self) -> None:
        """`MismatchError` if this is none."""
        if not self.is_drafter:
            raise MismatchError(
                f"{self.source} is no drafter but a {self.architecture}; a drafter's architecture"
                f" is one of {', '.join(sorted(DRAFTERS))}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON, as report.schema.json describes it."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict,
            "source": self.source,
            "architecture": self.architecture,
            "model": self.identity.as_dict() if self.identity else None,
            "producer": {
                "name": self.producer.name,
                "evidence": list(self.producer.evidence),
            },
            "head": self.head,
            "activations": self.activations,
            "groups": [row.as_dict() for row in self.groups],
            "high_precision": [kept.as_dict() for kept in self.high_precision],
            "kv_cache": [kept.as_dict() for kept in self.kept],
            "memory": self.forecast.as_dict() if self.forecast else None,
            "problems": [{"kind": f.kind, **f.as_dict()} for f in self.problems],
            "notes": [finding.as_dict() for finding in self.notes],
            "dropped": [finding.as_dict() for finding in self.dropped],
            "executables": [found.as_dict() for found in self.executables],
            "bytes": self.nbytes,
            "plan_hash": self.hash,
        }

    def text(self) -> str:
        """The report for a terminal: a refusal begins with its problems."""
        return printed(self)


def inspect_checkpoint(
    path: Path,
    *,
    weights_only: bool = False,
    source: str | None = None,
    sizes: Sizes | None = None,
) -> Report:
    """The plan for the checkpoint at `path`, from headers and configuration; reads no weights.

    Args:
        path: a folder, a safetensors file with `config.json` beside it, a GGUF file, or a saved
            header of one.
        weights_only: leave out what a recipe does to activations.
        source: what the report calls it; the path without it.
        sizes: by name the bytes of each file that belongs to it, where not all are there.

    Raises:
        UnreadableError: there is no checkpoint that could be judged.
    """
    path = Path(path)
    checkpoint = Checkpoint.open(path, sizes)
    folder = checkpoint.folder
    files = sizes or [file.name for file in folder.iterdir()]
    plan: LoadPlan | None = None
    foreign: tuple[Problem, ...] = ()
    recipe: tuple[str, ...] = ()
    try:
        config, raw = describe(checkpoint)
    except ForeignArchitecture as error:
        gguf = checkpoint.gguf is not None
        raw = {} if gguf else read_json_object(folder / "config.json")
        architecture = error.architecture
        foreign = (Problem("FOREIGN", "metadata" if gguf else "config.json", str(error)),)
    else:
        architecture = config.architecture
        plan = build_plan(checkpoint, config, raw, weights_only=weights_only)
        recipe = _claimed(raw) if weights_only else _followed(plan)
    return Report(
        folder=folder,
        source=source or str(path),
        architecture=architecture,
        checkpoint=checkpoint,
        producer=_producer(checkpoint, raw, files),
        executables=executables(folder, files),
        weights_only=weights_only,
        recipe=recipe,
        plan=plan,
        hash=None if plan is None or plan.problems else plan_hash(plan),
        foreign=foreign,
    )


def plan_checkpoint(path: Path, *, weights_only: bool = False, source: str | None = None) -> Report:
    """The report on a checkpoint that loads, with its plan; what else it needs can be read next.

    `source` is what the report calls it; the path without it.

    Raises:
        UnreadableError: there is no checkpoint that could be judged, or there are no weights.
        LoadError: it would not load exactly right; the text is the report.
    """
    report = inspect_checkpoint(path, weights_only=weights_only, source=source)
    if not report.loads:
        raise LoadError(report.text())
    report.require_weights()
    return report


def _producer(checkpoint: Checkpoint, raw: Mapping[str, Any], files: Collection[str]) -> Producer:
    if checkpoint.gguf is not None:
        return producer_of_gguf(checkpoint.gguf.metadata)
    return producer_of(raw, checkpoint.tensors, checkpoint.metadata, files)


def _followed(plan: LoadPlan) -> tuple[str, ...]:
    """A rule that asks for it may match no matrix that is quantized."""
    return tuple(dict.fromkeys(r.activations.name for r in plan.sites if r.activations is not None))


def _claimed(raw: Mapping[str, Any]) -> tuple[str, ...]:
    rules = read_rules(raw)
    claims = [claim for _, claim in rules.groups.values()]
    claims += [rules.everything] if rules.everything else []
    return tuple(dict.fromkeys(c.activations.name for c in claims if c.activations is not None))
