"""Checkpoints that other engines got wrong, as rows: the report, the layout, and what comes of it.

`python tests/formats.py` makes docs/formats.md of the rows of all `test_known_failures*` modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import Config, Tensors, altered

from cabochon.errors import CabochonError
from cabochon.load.execute import execute, tensors_of
from cabochon.load.plan import LoadPlan
from cabochon.load.report import Report, plan_checkpoint
from cabochon.nn.weight import Weight

Matrices = Mapping[str, Weight]


@dataclass(frozen=True)
class Known:
    """One layout that failed somewhere.

    It is refused with an error that has all of `refused` in it; or, without these, it loads, with
    `noted` among its notes, or with no note at all. Then every matrix, every parameter and what is
    done to activations is that of `source`, or, where `swapped[0]` (a regular expression) is found
    in the name, that of the checkpoint `swapped[1]`. None may be missing but those in whose names
    `idle` is found, and none may be there beyond them but `added`.
    """

    reference: str  # "vLLM #41206"
    layout: str  # what the file looks like
    source: Path | Callable[[], Path]  # or what makes it
    tensors: Callable[[Tensors], object] | None = None
    config: Callable[[Config], object] | None = None
    refused: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    swapped: tuple[str, Path] | None = None
    added: tuple[str, ...] = ()
    idle: str = "^$"
    beside: Callable[[Path], object] | None = None  # changes the other files of the folder

    @property
    def name(self) -> str:
        return f"{self.reference}: {self.layout}"

    @property
    def whole(self) -> Path:
        return self.source if isinstance(self.source, Path) else self.source()

    def make(self, folder: Path) -> Path:
        """The checkpoint, in `folder`."""
        made = altered(folder, self.whole, self.tensors, self.config)
        if self.beside is not None:
            self.beside(made)
        return made

    def check(self, folder: Path) -> None:
        made = self.make(folder)
        if self.refused:
            text = refusal(made)
            for part in self.refused:
                assert part in text
            return
        found = _loaded(made)
        assert bool(found.notes) == bool(self.noted), found.notes
        for part in self.noted:
            assert part in found.notes
        self._compare(found)

    def _compare(self, found: _Loaded) -> None:
        expected = _loaded(self.whole)
        if self.swapped is not None:
            part, folder = self.swapped
            expected = expected.with_those_of(_loaded(folder), re.compile(part))
        wanted = {name for name in expected.values if not re.search(self.idle, name)}
        assert found.values.keys() == wanted | set(self.added)
        for name in wanted:
            assert torch.equal(found.values[name], expected.values[name]), name
            assert found.rounding.get(name) == expected.rounding.get(name), name


@dataclass(frozen=True)
class _Loaded:
    """A checkpoint that loads."""

    notes: str
    values: Mapping[str, torch.Tensor]  # of matrices, decoded, and of parameters
    rounding: Mapping[str, set[str]]  # what is done to activations of each matrix, or of its parts

    def with_those_of(self, other: _Loaded, part: re.Pattern[str]) -> _Loaded:
        values = {n: v for n, v in other.values.items() if part.search(n)}
        rounding = {n: r for n, r in other.rounding.items() if part.search(n)}
        return _Loaded(self.notes, {**self.values, **values}, {**self.rounding, **rounding})


def _loaded(folder: Path) -> _Loaded:
    report = plan_checkpoint(folder)
    assert report.plan is not None
    model, certificate = execute(report.plan, dtype=torch.float32)
    told = (*report.notes, *report.dropped, *certificate.notes)
    rounding: dict[str, set[str]] = {}
    for read in report.plan.sites:
        how = "" if read.activations is None else read.activations.name
        rounding.setdefault(read.site.name, set()).add(how)
    wanted = {read.parameter.name for read in report.plan.parameters}
    values = {name: tensor for name, tensor in tensors_of(model) if name in wanted}
    values |= {n: w.dense(torch.float32) for n, w in _matrices(report.plan, model).items()}
    return _Loaded("\n".join(finding.detail for finding in told), values, rounding)


def refusal(folder: Path) -> str:
    """The words with which a checkpoint is refused."""
    try:
        load(folder)
    except CabochonError as error:
        return str(error)
    raise AssertionError(f"{folder} loads")


def load(folder: Path) -> tuple[Report, Matrices]:
    """The report on a checkpoint that loads, and its matrices by name."""
    report = plan_checkpoint(folder)
    assert report.plan is not None
    return report, _matrices(report.plan, execute(report.plan, dtype=torch.float32).model)


def _matrices(plan: LoadPlan, model: torch.nn.Module) -> Matrices:
    names = {read.site.name for read in plan.sites}
    return {name: model.get_submodule(name).weight for name in names}
