"""Makes docs/formats.md of the fixtures and of the known failures: `python tests/formats.py`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from corruption import files, folders
from known import Known
from written import everything

from cabochon.kernels.packed import unsupported
from cabochon.load.execute import build_weight
from cabochon.load.plan import SiteRead
from cabochon.load.report import plan_checkpoint
from cabochon.nn.weight import Coded, StoredFloats, Weight

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "formats.md"

HEAD = """\
# What loads

Made by `python tests/formats.py`; a test holds it to what the tests hold.

## Layouts that were loaded

Every row was written by its producer's own software, in part while the tests run, and is read in
the tests on each model that is named: each matrix is what the producer's own decoder makes of it,
and logits are those of transformers on decoded weights, at a cosine of 0.9999, with activations
rounded by the producer's arithmetic where the recipe rounds them
([models.md](models.md#what-is-verified) says how). Two are written by the tests:
Google's own format, whose converter is not public and which transformers reads, and what
compressed-tensors packed before 0.18 ("padded", "reordered"), of which files that 0.17 wrote say
how. "Kernel" is what multiplies where the kernels are built; PyTorch is the exact path.

"Without experts": no expert is stored so, all stay floats. GPTQModel, bitsandbytes, Google's format
and torchao's integers in groups are of linear layers alone, and stacked experts are none; ModelOpt
0.47 fails at AWQ and SVDQuant of experts.
"""

KNOWN_HEAD = """
## What broke elsewhere

Each row is a test, named by the report it comes from. "Kernel" is what multiplies the matrices that
are quantized; there is none where nothing loads, or where all is stored as floats.

| report | layout | model | here | kernel |
|---|---|---|---|---|
"""

FAULTS_HEAD = """
## What no loader can see

Each row is a mistake of an engine's model; a test makes it here, and comparison with transformers,
module by module, finds it where it is
([tests/test_verify_transformers.py](../tests/test_verify_transformers.py)).

| report | mistake | model |
|---|---|---|
"""

MEMBERS = {"e2b": "E2B", "12b": "12B", "26b": "26B-A4B", "31b": "31B"}


def page() -> str:
    layouts, known, faults = ("\n".join(rows()) for rows in (_layouts, _known, _faults))
    return f"{HEAD}\n{layouts}\n{KNOWN_HEAD}{known}\n{FAULTS_HEAD}{faults}\n"


def _layouts() -> Iterator[str]:
    yield "| producer | stored as | models | verdict | kernel |"
    yield "|---|---|---|---|---|"
    rows: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    of_experts: set[tuple[str, str]] = set()
    for path in (*folders(), *files(), *everything()):
        report = plan_checkpoint(path)
        assert report.plan is not None
        producer, _, _ = report.producer.name.partition(" 0.")  # whatever its version
        sites = report.plan.sites
        of_experts |= {(producer, r.stored_as) for r in sites if r.site.kind == "experts"}
        for read in first_of_each(sites):
            key = (producer, read.stored_as)
            members, kernels = rows.setdefault(key, (set(), set()))
            members.add(_member(path))
            kernels.add(_kernel(build_weight(read, torch.float32)))
    for (producer, stored), (members, kernels) in sorted(rows.items()):
        ordered = ", ".join(name for name in MEMBERS.values() if name in members)
        without = (producer, stored) not in of_experts
        names = ordered.replace("26B-A4B", "26B-A4B without experts") if without else ordered
        multiply = ", ".join(sorted(kernels))
        yield f"| {producer} | {stored} | {names} | loads | {multiply} |"


def first_of_each(sites: Iterable[SiteRead]) -> Iterable[SiteRead]:
    """One matrix for each way of storing one; floats are everywhere, and need no row."""
    found: dict[str, SiteRead] = {}
    for read in sites:
        if read.scheme.bits < 16:
            found.setdefault(read.stored_as, read)
    return found.values()


def _kernel(weight: Weight) -> str:
    described = weight.description()
    if isinstance(described, StoredFloats):
        return "floats as stored"
    if isinstance(described, Coded) and unsupported(described) is None:
        return f"{'integers' if described.values is None else 'table'} of {described.bits} bits"
    inner = [child for child in weight.modules() if isinstance(child, Weight)][1:]
    return _kernel(inner[0]) if inner else "PyTorch"


def _member(path: Path) -> str:
    """The model that a fixture, or a file or folder made of it, is a small one of."""
    return next(name for key, name in MEMBERS.items() if f"{key}-" in path.name)


def _known() -> Iterator[str]:
    with TemporaryDirectory() as room:
        for file in sorted(HERE.glob("test_known_failures*.py")):
            rows: Iterable[Known] = importlib.import_module(file.stem).KNOWN
            for number, row in enumerate(rows):
                yield _known_row(row, Path(room) / f"{file.stem}-{number}")


def _known_row(row: Known, folder: Path) -> str:
    verdict = "refused" if row.refused else "loads, with a note" if row.noted else "loads"
    kernels: set[str] = set()
    if not row.refused:
        report = plan_checkpoint(row.make(folder))
        assert report.plan is not None
        found = first_of_each(report.plan.sites)
        kernels = {_kernel(build_weight(read, torch.float32)) for read in found}
    layout, kernel = row.layout.replace("|", "/"), ", ".join(sorted(kernels))
    return f"| {row.reference} | {layout} | {_member(row.whole)} | {verdict} | {kernel} |"


def _faults() -> Iterator[str]:
    from test_verify_transformers import FAULTS

    for name, fault in FAULTS.items():
        if fault.report:
            mistake = name.removeprefix(fault.report).strip().replace("_", " ")
            yield f"| {fault.report} | {mistake} | {MEMBERS[fault.member]} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
