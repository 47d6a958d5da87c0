"""A load whose files compiled code reads in other threads finds and refuses what any load does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import W4A16, Tensors, altered, plan_of
from corruption import files, folders
from test_loading import cut_since, with_a_table

from cabochon.errors import LoadError, UnreadableError
from cabochon.kernels.choose import Kernels
from cabochon.kernels.library import library
from cabochon.load.certificate import Certificate
from cabochon.load.execute import execute
from cabochon.load.plan import LoadPlan
from cabochon.load.report import plan_checkpoint
from cabochon.nn.linear import Embedding, Linear
from cabochon.nn.weight import Stack, Weight
from cabochon.survey import surveyed

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler at installation")

TABLE = "model.language_model.embed_tokens_per_layer.weight"


def loaded(plan: LoadPlan, threads: int = 2) -> tuple[Certificate, dict[str, torch.Tensor]]:
    """By threads; and all matrices as their kernels have them."""
    with surveyed(plan, threads) as survey:
        assert survey is not None
        kernels = Kernels(library(), "int8", survey.backlog)
        model, certificate = execute(
            plan, dtype=torch.float32, look=survey, prepare=kernels.for_weight
        )
        survey.backlog.finish()
    return certificate, entries_of(model)


def entries_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    sites = {n: m for n, m in model.named_modules() if isinstance(m, Linear | Embedding)}
    return {name: dense(site.weight) for name, site in sites.items()}


def dense(weight: Weight | None) -> torch.Tensor:
    assert weight is not None
    if isinstance(weight, Stack):
        return torch.cat([dense(part) for part in weight.parts if isinstance(part, Weight)])
    return weight.dense(torch.float32)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("path", [*folders(), *files()], ids=lambda path: path.name)
def test_it_is_certified_as_without(path: Path, threads: int) -> None:
    plan = plan_checkpoint(path).plan
    assert plan is not None
    at_once = Kernels(library(), "int8").for_weight
    model, expected = execute(plan, dtype=torch.float32, prepare=at_once)
    certificate, found = loaded(plan, threads)
    assert certificate == expected
    for name, entries in entries_of(model).items():
        assert torch.equal(found[name], entries), name


@pytest.mark.parametrize("row", [3, 259_999])
def test_a_number_that_is_none_is_refused_by_name(tmp_path: Path, row: int) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[TABLE][row, 5] = torch.nan

    folder = altered(tmp_path / "damaged", with_a_table(tmp_path, 260_000), damage)
    with pytest.raises(LoadError, match=f"{TABLE}.* has 1 of 49920000 values"):
        loaded(plan_of(folder))


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_so_is_a_norm(tmp_path: Path, number: float) -> None:
    name = "model.language_model.norm.weight"

    def damage(tensors: Tensors) -> None:
        tensors[name][[2, 5]] = number

    with pytest.raises(LoadError, match=f"{name}.* has 2 of .* not finite in float32"):
        loaded(plan_of(altered(tmp_path, W4A16, damage)))


@pytest.mark.parametrize("cut", [1, 50_000_000])
def test_a_file_that_is_cut_after_it_was_planned(tmp_path: Path, cut: int) -> None:
    plan = cut_since(tmp_path, cut)
    with pytest.raises(UnreadableError, match="Download it again"):
        loaded(plan)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    plan = plan_of(altered(tmp_path, W4A16))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnreadableError, match="No such file"):
        loaded(plan)


def test_what_has_not_begun_is_forgotten(tmp_path: Path) -> None:
    """A load that ends early waits for no table, and nothing is written to memory that is gone."""
    plan = plan_of(with_a_table(tmp_path, 260_000))
    for _ in range(50):
        with pytest.raises(KeyboardInterrupt), surveyed(plan, 3):
            raise KeyboardInterrupt
