"""AutoRound against its own layers, which decoded what it made; AWQ's layout against AutoAWQ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import thin
import torch
from changes import quantization
from checkpoints import Tensors, altered, plan_of
from conftest import MEMBERS
from dequantized import check_answers, check_matrices
from known import load, refusal

from cabochon.load.report import inspect_checkpoint

SCHEMES = {
    "e2b-round4": {"gptq v1 int4 g32"},
    "26b-round4": {"gptq v1 int4 g32"},
    "31b-round4": {"gptq v1 int4 g32"},
    "e2b-round2-asym": {"gptq v2 int2 g32"},
    "e2b-round3-tail": {"gptq v1 int3 g64"},
    # 32 columns in groups of 64, filled up to 64
    "e2b-round-mixed": {"gptq v1 int8 g64", "gptq v1 int4 g32", "gptq v1 int2 g32"},
    **{f"{member}-round-awq": {"awq int4 g32"} for member in MEMBERS},
}
# Every width on every architecture.
WIDTHS = ("int2 g32", "int3 g64", "int4 g32", "int8 g64")
for member in MEMBERS:
    SCHEMES[f"{member}-round-few"] = {f"gptq v1 {width}" for width in WIDTHS}
    SCHEMES[f"{member}-round-few-asym"] = {f"gptq v2 {width}" for width in WIDTHS}
QUERY = "model.language_model.layers.1.self_attn.q_proj"
GATE = "model.language_model.layers.0.mlp.gate_proj"
NOTED = (
    "although config.json's dtype is float16",  # AutoRound writes so for AWQ's kernels
    "all others of its kind",
    "this rule of quantization_config matches nothing",  # one recipe for models with and without
)


@pytest.mark.parametrize("name", SCHEMES)
def test_matrices_are_auto_rounds(name: str, tmp_path: Path) -> None:
    folder = thin.whole(name, tmp_path)
    check_matrices(name, folder)
    assert {read.scheme.name for read in plan_of(folder).sites} == {"bf16", *SCHEMES[name]}
    notes = [note.detail for note in inspect_checkpoint(folder).notes]
    assert all(any(words in note for words in NOTED) for note in notes), notes


@pytest.mark.parametrize("name", SCHEMES)
def test_answers(name: str, tmp_path: Path) -> None:
    folder = thin.whole(name, tmp_path / "made")
    check_answers(folder, thin.source_of(thin.THIN / name), tmp_path)


def test_the_older_name_of_the_method(tmp_path: Path) -> None:
    made = thin.whole("e2b-round4", tmp_path / "made")
    change = quantization(quant_method="intel/auto-round")
    check_matrices("e2b-round4", altered(tmp_path / "x", made, config=change))


@pytest.mark.parametrize(
    "extra",
    [
        {"mlp": {"bits": 4, "group_size": 32}},
        {".*mlp\\..*_proj": {"bits": 4, "group_size": 32}},
        {"layers\\.\\d+\\.mlp": {"bits": 4, "group_size": 32}, "mlp": {"bits": 16}},
        {f"{QUERY.replace('.1.', f'.{n}.')}": {"bits": 16} for n in range(9)}
        | {"mlp": {"bits": 4}},
    ],
)
def test_names_and_parts_and_expressions(tmp_path: Path, extra: dict[str, Any]) -> None:
    """The first expression that is found counts; a whole name says nothing of other layers."""
    from cabochon.quant.configs import read_rules

    made = thin.whole("e2b-round-mixed", tmp_path / "made")
    config = thin.config_of(made)
    quantization(extra_config=extra)(config)
    rules = read_rules(config)
    sites = {read.site.name: read.site for read in plan_of(made).sites}
    claim = rules.claim(sites[GATE], [GATE])
    assert claim.scheme is not None
    assert claim.scheme.bits == 4
    assert rules.claim(sites[QUERY], [QUERY]).dense == (QUERY in extra)


@pytest.mark.parametrize(
    ("form", "other"), [("auto_round", "auto_round:auto_gptq"), ("auto_round:gptqmodel", None)]
)
def test_packing_formats_tell_zero_points_apart(
    tmp_path: Path, form: str, other: str | None
) -> None:
    made = thin.whole("e2b-round2-asym", tmp_path / "made")
    same = altered(tmp_path / "same", made, config=quantization(packing_format=form))
    check_matrices("e2b-round2-asym", same)
    if other is not None:
        wrong = altered(tmp_path / "wrong", made, config=quantization(packing_format=other))
        with pytest.raises(AssertionError, match="_proj"):
            check_matrices("e2b-round2-asym", wrong)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"packing_format": "auto_round:exllamav2"}, "packing_format 'auto_round:exllamav2'"),
        ({"packing_format": "auto_round:fp8_static"}, "packing_format 'auto_round:fp8_static'"),
        ({"data_type": "mx_int"}, "packing_format 'auto_round:auto_gptq' of 'mx_int'"),
        ({"act_bits": 8, "act_data_type": "fp"}, "AutoRound's 8-bit activations (fp)"),
        ({"bits": None}, "bits is None, expected one of"),
        ({"extra_config": [1]}, "extra_config is [1], expected an object"),
        ({"extra_config": {"(": {}}}, "is no regular expression"),
        ({"extra_config": {"mlp": 4}}, "extra_config['mlp'] is 4, expected an object"),
    ],
)
def test_claims_that_are_refused_by_name(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    made = thin.whole("e2b-round4", tmp_path / "made")
    folder = altered(tmp_path / "x", made, config=quantization(**values))
    assert words in refusal(folder)
    if "act_bits" in values:
        assert inspect_checkpoint(folder, weights_only=True).loads


def test_a_tail_that_is_not_stored(tmp_path: Path) -> None:
    """vLLM #43227: the last group has scales of its own, though it is not full."""
    made = thin.whole("e2b-round-mixed", tmp_path / "made")
    name = "model.language_model.layers.0.per_layer_projection"

    def cut(tensors: Tensors) -> None:
        tensors[f"{name}.qweight"] = tensors[f"{name}.qweight"][:8]

    right, found = load(made)[1], load(altered(tmp_path / "x", made, tensors=cut))[1]
    assert torch.equal(found[name].dense(torch.float32), right[name].dense(torch.float32))
