"""What a model's shape does to its files is the same in every format.

Layers that share keys and values may have their own all the same, full layers whose keys are their
values may not have values, and a head may be stored though it is tied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import Tensors, altered
from corruption import folders

from cabochon.load.report import Report, inspect_checkpoint

ATTENTION = re.compile(
    r"(.*language_model.*\.layers\.)(\d+)(\.self_attn\.)([kv]_(?:proj|norm))(\..+)"
)
TABLE = re.compile(r".*language_model\.(?:model\.)?embed_tokens\.(.+)")


def one_of_each() -> Iterator[Path]:
    """A fixture for each model that stands by itself, and each family of formats."""
    seen = set()
    for folder in folders():
        plan = inspect_checkpoint(folder).plan
        assert plan is not None
        if plan.config.drafting is not None:
            continue
        kinds = frozenset(type(read.scheme).__name__ for read in plan.sites)
        key = (folder.name.partition("-")[0], kinds)
        if key not in seen:
            seen.add(key)
            yield folder


FOLDERS = [pytest.param(folder, id=folder.name) for folder in one_of_each()]


def stored_as(report: Report) -> list[tuple[str, int | None, str]]:
    assert report.plan is not None
    return [(read.site.name, read.part, read.stored_as) for read in report.plan.sites]


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f.id.startswith("e2b")])
def test_keys_of_layers_that_share_them_are_dropped(folder: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name, tensor in list(tensors.items()):
            match = ATTENTION.fullmatch(name)
            if match is not None and match[2] in "12":
                for layer in ("3", "4") if match[2] == "1" else ("5",):
                    copy = f"{match[1]}{layer}{match[3]}{match[4]}{match[5]}"
                    assert copy not in tensors
                    tensors[copy] = tensor.clone()

    report = inspect_checkpoint(altered(tmp_path, folder, tensors=change))
    assert report.loads, report.text()
    assert stored_as(report) == stored_as(inspect_checkpoint(folder))
    assert any("keys and values of an earlier one" in f.detail for f in report.dropped)


@pytest.mark.parametrize("folder", [f for f in FOLDERS if not f.id.startswith("e2b")])
def test_values_where_they_are_keys_are_refused(folder: Path, tmp_path: Path) -> None:
    added = []

    def change(tensors: Tensors) -> None:
        for name, tensor in list(tensors.items()):
            match = ATTENTION.fullmatch(name)
            if match is not None and match[2] == "5" and match[4] == "k_proj":
                added.append(name.replace(".k_proj.", ".v_proj."))
                assert added[-1] not in tensors or "_scale" in added[-1]
                tensors[added[-1]] = tensor.clone()

    report = inspect_checkpoint(altered(tmp_path, folder, tensors=change))
    assert added
    assert not report.loads
    assert "layers.5.self_attn.v_proj" in report.text()
    assert "take their values from k_proj" in report.text()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_head_of_its_own_is_used(folder: Path, tmp_path: Path) -> None:
    had = inspect_checkpoint(folder)
    assert had.plan is not None
    if had.plan.has_head:
        assert had.head == "stored"
        return

    def change(tensors: Tensors) -> None:
        for name, tensor in list(tensors.items()):
            match = TABLE.fullmatch(name)
            if match is not None:
                tensors[f"lm_head.{match[1]}"] = tensor.clone()

    report = inspect_checkpoint(altered(tmp_path, folder, tensors=change))
    assert report.loads, report.text()
    assert report.head == "stored"
    found = {name: scheme for name, _, scheme in stored_as(report)}
    assert found["lm_head"] == found["model.language_model.embed_tokens"]
