"""Makes docs/formats.md of the fixtures and of the known failures: `python tests/formats.py`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from corruption import files, folders
from known import Known

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

Every row was written by its producer's own software and is read in the tests: each matrix is what
the producer's own decoder makes of it, and logits are those of transformers on decoded weights.
"Kernel" is what multiplies where the kernels are built; PyTorch is the exact path.

Beside these, tests have the producers write bitsandbytes (NF4, FP4, double quantization, other
storage dtypes, LLM.int8), fine-grained FP8, torchao, Google's own format and the rest of
compressed-tensors' formats for all four architectures while they run.
"""

KNOWN_HEAD = """
## What broke elsewhere

Each row is a test, named by the report it comes from.

| report | layout | here |
|---|---|---|
"""

MEMBERS = {"e2b": "E2B", "12b": "12B", "26b": "26B-A4B", "31b": "31B"}


def page() -> str:
    return HEAD + "\n".join(["", *_layouts()]) + "\n" + KNOWN_HEAD + "\n".join(_known()) + "\n"


def _layouts() -> Iterator[str]:
    yield "| producer | stored as | architectures | kernel |"
    yield "|---|---|---|---|"
    rows: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    for path in (*folders(), *files()):
        report = plan_checkpoint(path)
        assert report.plan is not None
        member = next(name for key, name in MEMBERS.items() if f"{key}-" in path.name)
        for read in first_of_each(report.plan.sites):
            key = (report.producer.name, read.stored_as)
            members, kernels = rows.setdefault(key, (set(), set()))
            members.add(member)
            kernels.add(_kernel(build_weight(read, torch.float32)))
    for (producer, stored), (members, kernels) in sorted(rows.items()):
        ordered = [name for name in MEMBERS.values() if name in members]
        yield f"| {producer} | {stored} | {', '.join(ordered)} | {', '.join(sorted(kernels))} |"


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


def _known() -> Iterator[str]:
    for file in sorted(HERE.glob("test_known_failures*.py")):
        rows: Iterable[Known] = importlib.import_module(file.stem).KNOWN
        for row in rows:
            verdict = "refused" if row.refused else "loads"
            if verdict == "loads" and row.noted:
                verdict = "loads, with a note"
            yield f"| {_linked(row.reference)} | {row.layout.replace('|', '/')} | {verdict} |"


def _linked(reference: str) -> str:
    """Numbers as they are: a link would go to whichever repository shows the page."""
    return re.sub(r"\s+", " ", reference)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
