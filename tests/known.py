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
from cabochon.load.execute import execute
from cabochon.load.report import Report, plan_checkpoint
from cabochon.nn.weight import Weight

Matrices = Mapping[str, Weight]


@dataclass(frozen=True)
class Known:
    """One layout that failed somewhere.

    It is refused with an error that has all of `refused` in it; or, without these, it loads, with
    `noted` among its notes, and every matrix is that of `source`, or, where `swapped[0]` (a regular
    expression) is found in its name, that of the checkpoint `swapped[1]`.
    """

    reference: str  # "vLLM #41206"
    layout: str  # what the file looks like
    source: Path
    tensors: Callable[[Tensors], object] | None = None
    config: Callable[[Config], object] | None = None
    refused: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    swapped: tuple[str, Path] | None = None

    @property
    def name(self) -> str:
        return f"{self.reference}: {self.layout}"

    def make(self, folder: Path) -> Path:
        """The checkpoint, in `folder`."""
        return altered(folder, self.source, self.tensors, self.config)

    def check(self, folder: Path) -> None:
        made = self.make(folder)
        if self.refused:
            text = refusal(made)
            for part in self.refused:
                assert part in text
        else:
            report, found = load(made)
            self._compare(found)
            notes = "\n".join(finding.detail for finding in (*report.notes, *report.dropped))
            for part in self.noted:
                assert part in notes

    def _compare(self, found: Matrices) -> None:
        expected = dict(load(self.source)[1])
        if self.swapped is not None:
            part, folder = self.swapped
            expected |= {n: w for n, w in load(folder)[1].items() if re.search(part, n)}
        assert not expected.keys() - found.keys()
        for name, weight in expected.items():
            assert torch.equal(found[name].dense(torch.float32), weight.dense(torch.float32)), name


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
    model = execute(report.plan, dtype=torch.float32).model
    names = {read.site.name for read in report.plan.sites}
    return report, {name: model.get_submodule(name).weight for name in names}
