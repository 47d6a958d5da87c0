"""Matrices that stay in their files are the ones that a load puts into memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corruption import files, folders

from cabochon.load.execute import execute
from cabochon.load.in_file import InFile, in_file
from cabochon.load.report import plan_checkpoint

FIXTURES = (*folders(), *files())


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_every_matrix_is_the_loaded_one(path: Path) -> None:
    plan = plan_checkpoint(path).plan
    assert plan is not None
    loaded = execute(plan, dtype=torch.float32).model
    streamed = in_file(plan, dtype=torch.float32)
    for read in plan.sites:
        ours = streamed.get_submodule(read.site.name).weight
        expected = loaded.get_submodule(read.site.name).weight
        rows, width = expected.out_features, expected.in_features
        start, stop = rows // 3, rows - rows // 5
        dense = expected.dense(torch.float32)
        assert torch.equal(ours.dense(torch.float32), dense)
        assert torch.equal(ours.dense(torch.float32, start, stop), dense[start:stop])
        x = torch.randn(2, width)
        wanted = expected.linear(x, start, stop)
        torch.testing.assert_close(ours.linear(x, start, stop), wanted, rtol=1e-4, atol=1e-5)
        if read.part is None:
            ids = torch.tensor([[rows - 1, 0], [rows // 2, 0]])
            assert torch.equal(ours.rows(ids, torch.float32), dense[ids])


def test_only_the_rows_that_are_asked_for_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_checkpoint(FIXTURES[0]).plan
    assert plan is not None
    table = next(read for read in plan.sites if read.site.name.endswith("embed_tokens"))
    seen = []
    original = type(next(iter(table.stored.values()))).rows
    monkeypatch.setattr(
        type(next(iter(table.stored.values()))),
        "rows",
        lambda meta, start, stop: seen.append((start, stop)) or original(meta, start, stop),
    )
    InFile(table).rows(torch.tensor([5, 9]), torch.float32)
    assert seen == [(5, 6), (9, 10)]
