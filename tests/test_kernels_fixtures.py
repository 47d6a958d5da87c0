"""Whatever a checkpoint holds, its kernels multiply by what `dense` says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corruption import files, folders
from formats import first_of_each
from written import WAYS, written

from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import library
from cabochon.load.execute import build_weight
from cabochon.load.plan import LoadPlan
from cabochon.load.report import plan_checkpoint
from cabochon.nn.weight import Weight

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: kernels are not built")


@pytest.mark.parametrize("path", [*folders(), *files()], ids=lambda path: path.name)
def test_of_every_fixture(path: Path) -> None:
    plan = plan_checkpoint(path).plan
    assert plan is not None
    check(plan)


@pytest.mark.parametrize("way", WAYS)
def test_of_all_that_is_written(way: str) -> None:
    plan = plan_checkpoint(written(way, "e2b")).plan
    assert plan is not None
    check(plan)


def check(plan: LoadPlan) -> None:
    for read in first_of_each(plan.sites):
        weight = innermost(build_weight(read, torch.float32))
        x = torch.randn(3, weight.in_features)
        expected = x @ weight.dense(torch.float32).T
        found = Kernels(library(), "float32").for_weight(weight).linear(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def innermost(weight: Weight) -> Weight:
    """Without what rounds or smooths activations: what is stored."""
    inner = getattr(weight, "weight", None) or getattr(weight, "inner", None)
    return innermost(inner) if isinstance(inner, Weight) else weight
