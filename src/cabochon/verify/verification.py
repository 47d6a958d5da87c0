"""`cabochon verify`: the stages in their order, and one verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from cabochon.assembly import open_text
from cabochon.config import Gemma4Config, TextConfig
from cabochon.engine.request import Prompt
from cabochon.errors import LoadError, UnreadableError
from cabochon.gemma4.model import Gemma4
from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import Activations, library
from cabochon.load.certify import certify
from cabochon.load.execute import Model, execute
from cabochon.load.forecast import machine_memory
from cabochon.load.in_file import in_file
from cabochon.load.plan import LoadPlan
from cabochon.load.report import Report, plan_checkpoint
from cabochon.verify.against import Models, modules_against, weights_against
from cabochon.verify.alive import is_alive
from cabochon.verify.probes import probes
from cabochon.verify.reference import against_transformers
from cabochon.verify.stage import Finding, Progress, Stage, left_out, timed
from cabochon.verify.truth import kernels_tell_the_truth
from cabochon.verify.upstream import blank, fill

SCHEMA = 1  # of the JSON
IN_MEMORY = 1 << 30  # bytes of weights up to which they are not read from files again and again

ROOM = 0.75  # of the machine's memory
Reference = Literal["ours", "transformers"]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was verified, against what, and how it went."""

    path: Path
    against: Path | None
    report: Report
    stages: tuple[Stage, ...]

    @property
    def passed(self) -> bool:
        return all(stage.passed for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "checkpoint": str(self.path),
            "against": None if self.against is None else str(self.against),
            "verified": self.passed,
            "stages": [
                {
                    "name": stage.name,
                    "verdict": stage.verdict,
                    "seconds": round(stage.seconds, 3),
                    "summary": stage.finding.summary,
                    "faults": stage.finding.faults,
                    "facts": stage.finding.facts,
                    "data": stage.finding.data,
                }
                for stage in self.stages
            ],
        }


class Subject:
    """A checkpoint with all that its verification needs. A large one stays in its files.

    Raises:
        UnreadableError, LoadError: it is no checkpoint that loads.
    """

    def __init__(self, path: Path, *, weights_only: bool = False) -> None:
        self.path = path
        self.report = plan_checkpoint(path, weights_only=weights_only)
        self.report.require_model()
        assert self.report.plan is not None
        self.plan = self.report.plan

    @cached_property
    def model(self) -> Gemma4:
        if self.plan.nbytes > IN_MEMORY:
            return _whole(in_file(self.plan, dtype=torch.float32))
        return _whole(execute(self.plan, dtype=torch.float32).model)

    def served(self, kernels: Kernels) -> Gemma4:
        """A model for many steps: as it is served, if what is read in each step has room."""
        tables = sum(read.nbytes for read in self.plan.sites if read.site.kind == "embedding")
        if self.plan.nbytes <= IN_MEMORY or self.plan.nbytes - tables > ROOM * machine_memory():
            return self.model
        return _whole(in_file(self.plan, dtype=torch.float32, hold=kernels.for_weight))


def _whole(model: Model) -> Gemma4:
    assert isinstance(model, Gemma4)
    return model


def verify(
    path: Path,
    against: Path | None = None,
    *,
    reference: Reference = "ours",
    activations: Activations = "int8",
    to_the_end: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Verify the checkpoint `path`, by itself or against the one it was made from.

    Args:
        reference: whose model says what is right; transformers' finds faults of ours.
        activations: how serving would round activations, which the kernels are tried with.
        to_the_end: run the stages that follow one that failed, too.

    Raises:
        UnreadableError, LoadError: one of the checkpoints cannot be used at all, or transformers is
            wanted and not there.
    """
    subject = Subject(path)
    original = None if against is None else Subject(against)
    _check_alike(subject, original)
    theirs = None if reference == "ours" else blank(subject.report.checkpoint.folder)
    stages: list[Stage] = []
    for name, work in _stages(subject, original, theirs, activations, progress):
        if all(stage.passed for stage in stages) or to_the_end:
            stages.append(timed(name, work))
        else:
            stages.append(left_out(name, "an earlier stage failed; --to-the-end goes on"))
    return Verification(path, against, subject.report, tuple(stages))


def _stages(
    subject: Subject,
    original: Subject | None,
    theirs: Any,
    activations: Activations,
    progress: Progress | None,
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    yield "plan and certificate", lambda: _certified(subject.plan, progress)
    kernels = Kernels(library(), activations)
    yield "kernels", lambda: kernels_tell_the_truth(subject.plan, kernels)
    prompts, defaults = open_text(subject.report)
    walk = _as_bytes(progress, subject.plan)
    ends = frozenset(defaults.ends)
    yield "alive", lambda: is_alive(subject.served(kernels), prompts, ends, walk)
    if original is not None:
        plan = original.plan
        yield "weights", lambda: weights_against(plan, subject.plan, progress)
        yield "modules", lambda: _side_by_side(original, subject, probes(prompts), walk)
    if theirs is not None:
        yield "transformers", lambda: _beside(theirs, subject, probes(prompts), walk)


def _as_bytes(progress: Progress | None, plan: LoadPlan) -> Progress | None:
    """A bar of bytes for what is counted in steps or layers."""
    if progress is None:
        return None
    return lambda done, of: progress(done * plan.nbytes // of, plan.nbytes)


def _side_by_side(
    original: Subject, subject: Subject, prompts: Mapping[str, Prompt], progress: Progress | None
) -> Finding:
    models = Models(original.model, subject.model, subject.plan)
    return modules_against(models, _common(prompts, original), progress)


def _beside(
    theirs: Any, subject: Subject, prompts: Mapping[str, Prompt], progress: Progress | None
) -> Finding:
    """What a recipe does to activations is left out of both: transformers' model knows nothing."""
    if subject.report.recipe:
        subject = Subject(subject.path, weights_only=True)
    fill(theirs, subject.model)
    return against_transformers(theirs, subject.model, prompts, progress)


def _certified(plan: LoadPlan, progress: Progress | None) -> Finding:
    try:
        certificate = certify(plan, progress=progress)
    except (LoadError, UnreadableError) as error:
        return Finding("the weights cannot be right", faults=[str(error)])
    notes = [f"{where}: {note.detail}" for note in certificate.notes for where in note.where]
    return Finding(
        f"fingerprint {certificate.fingerprint}; {certificate.filled} matrices and parameters,"
        f" {plan.nbytes / 1e9:.3g} GB",
        facts=notes,
        data={"fingerprint": certificate.fingerprint},
    )


def _text(config: Gemma4Config) -> TextConfig:
    """Of files of GGUF, and of exports of text alone, nobody can say how pictures would be seen."""
    layers = tuple(replace(layer, pictures="causal") for layer in config.text.layers)
    return replace(config.text, layers=layers)


def _common(prompts: Mapping[str, Prompt], original: Subject) -> Mapping[str, Prompt]:
    """Those that the original, too, has a sense for."""
    config = original.plan.config
    lacking = {"picture": config.vision is None, "sound": config.audio is None}
    return {name: prompt for name, prompt in prompts.items() if not lacking.get(name)}


def _check_alike(subject: Subject, original: Subject | None) -> None:
    if original is None:
        return
    ours, theirs = subject.plan.config, original.plan.config
    if _text(ours) != _text(theirs):
        raise UnreadableError(
            f"{original.report.folder} is no original of {subject.report.folder}: their"
            " configurations describe different models"
        )
