"""AWQ's `gemm` layout: AutoRound packed the fixtures with AutoAWQ's layer, AutoAWQ decoded them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import thin
import torch
from changes import quantization
from checkpoints import FIXTURES, Config, Tensors, altered, plan_of
from conftest import MEMBERS
from dequantized import check_answers, check_matrices
from known import load, refusal

from cabochon.load.report import inspect_checkpoint

GATE = "model.language_model.layers.0.mlp.gate_proj"
Q = f"{GATE}.qweight"


MADE = [f"{member}-awq" for member in MEMBERS]


@pytest.mark.parametrize("name", MADE)
def test_matrices_are_autoawqs(name: str, tmp_path: Path) -> None:
    folder = thin.whole(name, tmp_path)
    check_matrices(name, folder)
    assert {read.scheme.name for read in plan_of(folder).sites} == {"bf16", "awq int4 g32"}
    assert inspect_checkpoint(folder).loads


@pytest.mark.parametrize("name", MADE)
def test_answers(name: str, tmp_path: Path) -> None:
    folder = thin.whole(name, tmp_path / "made")
    check_answers(folder, thin.source_of(thin.THIN / name), tmp_path)


def repacked(order: tuple[int, ...]) -> Any:
    """Nibbles of each word in another order."""

    def change(tensors: Tensors) -> None:
        for leaf in ("qweight", "qzeros"):
            words = tensors[f"{GATE}.{leaf}"]
            nibbles = torch.stack([words >> 4 * place & 15 for place in order], dim=-1)
            shifts = torch.arange(0, 32, 4, dtype=torch.int32)
            tensors[f"{GATE}.{leaf}"] = (nibbles << shifts).sum(dim=-1, dtype=torch.int32)

    return change


@pytest.mark.parametrize(
    "order",
    [(0, 4, 1, 5, 2, 6, 3, 7), (1, 0, 3, 2, 5, 4, 7, 6), (7, 6, 5, 4, 3, 2, 1, 0)],
    ids=["sequential", "swapped", "reversed"],
)
def test_another_order_of_nibbles_is_another_matrix(tmp_path: Path, order: tuple[int, ...]) -> None:
    made = thin.whole("e2b-awq", tmp_path / "made")
    other = altered(tmp_path / "x", made, tensors=repacked(order))
    with pytest.raises(AssertionError, match="gate_proj"):
        check_matrices("e2b-awq", other)


def less_one(tensors: Tensors) -> None:
    tensors[f"{GATE}.qzeros"] -= 0x11111111


def reciprocal(tensors: Tensors) -> None:
    tensors[f"{GATE}.scales"] = (1 / tensors[f"{GATE}.scales"].float()).clamp(-6e4, 6e4).half()


@pytest.mark.parametrize("change", [less_one, reciprocal])
def test_other_conventions_are_other_matrices(tmp_path: Path, change: Any) -> None:
    made = thin.whole("e2b-awq", tmp_path / "made")
    with pytest.raises(AssertionError, match="gate_proj"):
        check_matrices("e2b-awq", altered(tmp_path / "x", made, tensors=change))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"version": "gemv"}, "AWQ's layout 'gemv' is not supported by this version; 'gemm' is"),
        ({"version": "gemv_fast"}, "'gemv_fast'"),
        ({"version": "exllama"}, "'exllama'"),
        ({"bits": 8}, "AWQ of 8 bits is not supported; 4 are"),
        ({"group_size": "32"}, "group_size is '32', expected a whole number"),
        ({"modules_to_not_convert": "vision"}, "expected a list of names"),
    ],
)
def test_layouts_that_are_refused_by_name(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    made = thin.whole("e2b-awq", tmp_path / "made")
    assert words in refusal(altered(tmp_path / "x", made, config=quantization(**values)))


def test_other_words_for_the_same(tmp_path: Path) -> None:
    made = thin.whole("e2b-awq", tmp_path / "made")

    def older(config: Config) -> None:
        config["quantization_config"] = {
            "quant_method": "awq",
            "w_bit": 4,
            "q_group_size": 32,
            "zero_point": True,
            "version": "GEMM",
            "modules_to_not_convert": None,
        }

    check_matrices("e2b-awq", altered(tmp_path / "x", made, config=older))


@pytest.mark.parametrize("leaf", ["qweight", "qzeros", "scales"])
def test_one_tensor_lost_or_turned(tmp_path: Path, leaf: str) -> None:
    made = thin.whole("e2b-awq", tmp_path / "made")
    name = f"{GATE}.{leaf}"
    lost = refusal(altered(tmp_path / "lost", made, tensors=lambda t: t.pop(name)))
    assert GATE in lost
    assert f"{leaf} is missing" in lost
    turn = lambda t: t.update({name: t[name].T})  # noqa: E731
    assert GATE in refusal(altered(tmp_path / "turned", made, tensors=turn))


def test_gptq_that_says_awq(tmp_path: Path) -> None:
    """The layout is GPTQ's, and nothing says of which version: refused, not unpacked as AWQ."""
    made = thin.whole("e2b-gptq4", tmp_path / "made")
    change = quantization(quant_method="awq", version="gemm")
    text = refusal(altered(tmp_path / "x", made, config=change))
    assert "its tensors fit gptq v1 int4 g32 and gptq v2 int4 g32" in text


def test_awq_that_says_gptq(tmp_path: Path) -> None:
    """Shapes tell the two apart, so that it loads, with a note."""
    made = thin.whole("e2b-awq", tmp_path / "made")
    change = quantization(quant_method="gptq", checkpoint_format="gptq", desc_act=False)
    other = altered(tmp_path / "x", made, config=change)
    check_matrices("e2b-awq", other)
    assert "the tensors are awq int4 g32: loaded so" in inspect_checkpoint(other).text()


def test_compressed_tensors_that_say_awq(tmp_path: Path) -> None:
    """Repositories named AWQ are often compressed-tensors: what is stored decides."""
    source = FIXTURES / "e2b-w4a16"

    def change(config: Config) -> None:
        config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}

    other = altered(tmp_path / "x", source, config=change)
    right, found = load(source)[1], load(other)[1]
    assert torch.equal(found[GATE].dense(torch.float32), right[GATE].dense(torch.float32))
    assert "says awq int4 g32, the tensors are int4 g32" in inspect_checkpoint(other).text()
