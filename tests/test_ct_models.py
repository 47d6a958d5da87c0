"""Checkpoints of llm-compressor answer as compressed-tensors computes, activations included."""

from __future__ import annotations

from pathlib import Path

import ct
import pytest
import torch
from checkpoints import FIXTURES, Config, altered, load_model
from ct import Claims, decompress, decompressed, modules_of, oracle
from guided import same_logits
from spread import within_its_own
from thin import fixture
from upstream import reference, same_answers

from cabochon import LLM
from cabochon.files import read_json_object
from cabochon.load.report import inspect_checkpoint, plan_checkpoint

# What is stored, beside bfloat16, and what is done to what goes in and comes out.
MADE = {
    "e2b-w8a8": {"int8 channel, inputs int8 per token"},
    "e2b-mobile": {
        "int2 channel",
        "int4 g32",
        "int8 channel, inputs int8 static, outputs int8 static",
        "int4 channel, inputs int8 static, outputs int8 static",
        "int2 channel, inputs int8 static, outputs int8 static",
    },
    "12b-mixed": {"fp8 channel, inputs fp8 per token", "nvfp4, inputs fp4 g16 e4m3"},
    "26b-fp8-all": {"fp8 channel, inputs fp8 per token"},
    "26b-mxfp4": {"mxfp4, inputs fp4 g32 e8m0"},
    "26b-nvfp4": {"nvfp4, inputs fp4 g16 e4m3"},
    "31b-fp8-block": {"fp8 128x128, inputs fp8 g128"},
    "31b-fp8-static": {"fp8 tensor, inputs fp8 static"},
    "31b-w8a8-static": {"int8 channel, inputs int8 static asymmetric"},
}
SCHEMES = {"e2b-w8a8": ["int8 channel"], "26b-nvfp4": ["nvfp4"]}
FOLDERS = [pytest.param(fixture(name), id=name) for name in MADE]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_matrix_is_what_upstream_decompresses(folder: Path) -> None:
    model, report = load_model(folder, dtype=torch.float32)
    assert {read.stored_as for read in report.plan.sites} == MADE[folder.name] | {"bf16"}
    assert not report.notes
    claims, modules = Claims(folder), modules_of(folder)
    for read in report.plan.sites:
        if read.scheme.name == "bf16":
            continue
        name = next(iter(read.stored.values())).name.rpartition(".")[0]
        weight = model.get_submodule(read.site.name).weight
        found = (weight if read.part is None else weight.parts[read.part]).dense(torch.float32)
        assert torch.equal(found, decompress(modules.pop(name), claims.scheme(name)).float()), name
    assert not modules


@pytest.mark.parametrize("folder", FOLDERS)
def test_answers(folder: Path, tmp_path: Path) -> None:
    same_logits(folder, oracle(folder, tmp_path))


@pytest.mark.parametrize("folder", FOLDERS)
def test_answers_left_to_themselves(folder: Path, tmp_path: Path) -> None:
    """No layer of the oracle is given our activations: as near as it is to itself."""
    with LLM(folder, dtype="float32") as llm:
        prompt = llm.prompts.raw([2, 4, *range(300, 340), 5], ())
        ours = llm.logits(list(prompt.tokens), ())
    within_its_own(ours, oracle(folder, tmp_path), prompt)


@pytest.mark.parametrize("name", ["e2b-w8a8", "26b-nvfp4"])
def test_weights_only_ignores_the_recipe_for_activations(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fixture(name)
    model = reference(folder, decompressed(folder), tmp_path)
    same_answers(folder, model, weights_only=True, count=4)
    report = plan_checkpoint(folder, weights_only=True)
    assert {read.stored_as for read in report.plan.sites} == {"bf16", *SCHEMES[name]}
    monkeypatch.setattr(ct, "simulated", lambda module, end, arguments, x: x)
    with pytest.raises(AssertionError, match="rows differ"):  # and it makes a difference
        same_logits(folder, oracle(folder, tmp_path))


def test_weights_load_without_a_recipe_that_is_not_known(tmp_path: Path) -> None:
    def six(config: Config) -> None:
        (group,) = config["quantization_config"]["config_groups"].values()
        group["input_activations"]["num_bits"] = 6

    folder = altered(tmp_path, fixture("e2b-w8a8"), config=six)
    text = inspect_checkpoint(folder).text()
    assert "input_activations of 6-bit int are not supported by this version" in text
    assert "--weights-only does without" in text
    assert inspect_checkpoint(folder, weights_only=True).loads


def test_a_recipe_that_no_matrix_follows_is_not_said_to_be_in_force(tmp_path: Path) -> None:
    quantized = read_json_object(fixture("e2b-w8a8") / "config.json")["quantization_config"]

    def claim(config: Config) -> None:
        config["quantization_config"] = quantized

    report = inspect_checkpoint(altered(tmp_path, FIXTURES / "e2b-bf16", config=claim))
    assert report.loads
    assert report.activations == "not quantized"
    told = inspect_checkpoint(fixture("e2b-w8a8")).activations
    assert told == "int8 per token, as the recipe says; --weights-only leaves it out"
