"""GPTQ against GPTQModel, which made the fixtures and decoded them with its own torch kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import thin
import torch
from changes import quantization
from checkpoints import altered, plan_of
from conftest import MEMBERS
from dequantized import check_answers, check_matrices
from known import load, refusal

from cabochon.load.report import inspect_checkpoint
from cabochon.nn.permuted import Permuted

FOURS = ("e2b-gptq4", "12b-gptq4", "26b-gptq4", "31b-gptq4")
SCHEMES = {
    **{name: {"gptq v1 int4 g32"} for name in FOURS},
    "e2b-gptq2-v2": {"gptq v2 int2 g32"},
    "e2b-gptq3": {"gptq v1 int3 g32"},
    "e2b-gptq4-act": {"gptq v1 int4 g32"},
    "e2b-gptq4-v2": {"gptq v2 int4 g32"},
    "e2b-gptq8": {"gptq v1 int8 channel"},
    "e2b-gptq-dynamic": {"gptq v1 int4 g32", "gptq v1 int8 g16"},
}
# Every width on every architecture: v1 with columns in another order, v2 with zero points.
WIDTHS = ("int2 g32", "int3 g32", "int4 g32", "int8 g16", "int8 channel")
for member in MEMBERS:
    SCHEMES[f"{member}-gptq-few"] = {f"gptq v1 {width}" for width in WIDTHS}
    SCHEMES[f"{member}-gptq-few-v2"] = {f"gptq v2 {width}" for width in WIDTHS}


@pytest.mark.parametrize("name", SCHEMES)
def test_matrices_are_gptqmodels(name: str, tmp_path: Path) -> None:
    folder = thin.whole(name, tmp_path)
    found = check_matrices(name, folder)
    assert {read.scheme.name for read in plan_of(folder).sites} == {"bf16", *SCHEMES[name]}
    reordered = [weight for weight in found.values() if isinstance(weight, Permuted)]
    assert bool(reordered) == (name == "e2b-gptq4-act" or name.endswith("-few"))
    notes = [note.detail for note in inspect_checkpoint(folder).notes]
    assert all("all others of its kind" in note for note in notes), notes


@pytest.mark.parametrize("name", SCHEMES)
def test_answers(name: str, tmp_path: Path) -> None:
    folder = thin.whole(name, tmp_path / "made")
    check_answers(folder, thin.source_of(thin.THIN / name), tmp_path)


GATE = "model.language_model.layers.0.mlp.gate_proj"


def asymmetric(folder: Path) -> Path:
    return thin.whole("e2b-gptq4-v2", folder)


def test_v1_is_not_v2(tmp_path: Path) -> None:
    """The same tensors under the other version's name decode to other numbers: one step higher."""
    made = asymmetric(tmp_path / "made")
    other = altered(tmp_path / "other", made, config=quantization(checkpoint_format="gptq"))
    right, wrong = load(made)[1][GATE], load(other)[1][GATE]
    step = right.dense(torch.float32) - wrong.dense(torch.float32)
    scale = thin.tensors_of(made)[f"{GATE}.scales"].float().T.repeat_interleave(32, 1)
    torch.testing.assert_close(step, scale, rtol=0.01, atol=0)


def test_without_a_version_nothing_is_guessed(tmp_path: Path) -> None:
    made = asymmetric(tmp_path / "made")
    text = refusal(altered(tmp_path / "x", made, config=lambda c: c.pop("quantization_config")))
    assert "fit gptq v1 int4 g32 and gptq v2 int4 g32" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format 'gptq_p' is not supported"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ({"planar": True}, "planar layout"),
        ({"pack_dtype": "int8"}, "pack_dtype 'int8'"),
        ({"bits": "four"}, "quantization_config.bits is 'four'"),
        ({"bits": 16}, "bits is 16, expected one of"),
        ({"dynamic": [1]}, "quantization_config.dynamic is [1], expected an object"),
        ({"dynamic": {"+:(": {}}}, "is no regular expression"),
    ],
)
def test_layouts_that_are_refused_by_name(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    made = asymmetric(tmp_path / "made")
    assert words in refusal(altered(tmp_path / "x", made, config=quantization(**change)))


def test_an_order_that_fills_no_groups(tmp_path: Path) -> None:
    made = thin.whole("e2b-gptq4-act", tmp_path / "made")

    def crooked(tensors: thin.Tensors) -> None:
        tensors[f"{GATE}.g_idx"][5] = 1 - tensors[f"{GATE}.g_idx"][5]

    text = refusal(altered(tmp_path / "x", made, tensors=crooked))
    assert f"g_idx of '{GATE}' does not put 32 columns in each group" in text


def test_an_order_that_is_lost(tmp_path: Path) -> None:
    made = thin.whole("e2b-gptq4-act", tmp_path / "made")
    text = refusal(altered(tmp_path / "x", made, tensors=lambda t: t.pop(f"{GATE}.g_idx")))
    assert GATE in text


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
def test_one_tensor_lost(tmp_path: Path, leaf: str) -> None:
    made = asymmetric(tmp_path / "made")
    text = refusal(altered(tmp_path / "x", made, tensors=lambda t: t.pop(f"{GATE}.{leaf}")))
    assert GATE in text
    assert f"{leaf} is missing" in text


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
def test_one_tensor_transposed(tmp_path: Path, leaf: str) -> None:
    made = asymmetric(tmp_path / "made")

    def transpose(tensors: thin.Tensors) -> None:
        tensors[f"{GATE}.{leaf}"] = tensors[f"{GATE}.{leaf}"].T

    assert GATE in refusal(altered(tmp_path / "x", made, tensors=transpose))
