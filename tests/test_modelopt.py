"""ModelOpt: its own exports are read as its own classes decode them, and compute as it computes.

`fixtures/make_modelopt.py` says how the files and what is expected of them were made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import thin
import torch
from checkpoints import Config, Tensors, altered, config_of, load_model, plan_of, tensors_of
from conftest import FIXTURES
from guided import same_logits
from modelopt_oracle import inputs_of, matrix, numbers, oracle, parts_of, rounding_of
from safetensors import safe_open
from test_schemes import check
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cabochon import LLM
from cabochon.errors import LoadError
from cabochon.load.report import inspect_checkpoint
from cabochon.nn.activations import RoundedWeight
from cabochon.nn.smoothed import CorrectedWeight, SmoothedWeight
from cabochon.quant.modelopt_schemes import RowPairs
from cabochon.quant.scheme import Site

WHOLE = sorted(path.name for path in (FIXTURES / "modelopt").iterdir())
# Without what they share with their sources; of most of them only half of the layers is quantized.
# ModelOpt (0.47.0) itself fails to export AWQ and SVDQuant of a mixture of experts; those of
# 26B-A4B are made without the step that fails (`make_modelopt.py`).
KEPT_THIN = sorted(path.name for path in thin.THIN.glob("*-modelopt-*"))
MADE = [*WHOLE, *KEPT_THIN]
TOKENS = [2, 4, *range(300, 340), 5]
SCHEMES = {
    "26b-mixed": {"fp8 tensor, inputs fp8 static", "nvfp4 modelopt, inputs fp4 g16 e4m3"},
    "26b-nvfp4": {"nvfp4 modelopt, inputs fp4 g16 e4m3"},
    "31b-fp8-rows-kv": {"fp8 channel, inputs fp8 per token"},
    "31b-nvfp4-awq": {
        "nvfp4 modelopt, inputs fp4 g16 e4m3",
        "nvfp4 modelopt smoothed, inputs fp4 g16 e4m3",
    },
    "31b-nvfp4-svd": {"nvfp4 modelopt + rank 32 smoothed, inputs fp4 g16 e4m3"},
    "31b-w4a16-awq": {"int4 g32 by row pairs", "int4 g32 by row pairs smoothed"},
    "31b-w4a8-awq": {
        "int4 g32 by row pairs as fp8, inputs fp8 static",
        "int4 g32 by row pairs as fp8 smoothed, inputs fp8 static",
    },
    "e2b-fp8": {"fp8 tensor, inputs fp8 static"},
}
# What each form is in the files of other models.
FORMS = {
    "fp8": SCHEMES["e2b-fp8"],
    "fp8-rows": SCHEMES["31b-fp8-rows-kv"],
    "nvfp4": SCHEMES["26b-nvfp4"],
    "nvfp4-weights": {"nvfp4 modelopt"},
    "nvfp4-awq": SCHEMES["31b-nvfp4-awq"],
    "nvfp4-svd": SCHEMES["31b-nvfp4-svd"],
    "w4a16-awq": SCHEMES["31b-w4a16-awq"],
    "w4a8-awq": SCHEMES["31b-w4a8-awq"],
}
MLP = "model.language_model.layers.1.mlp"


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of ModelOpt's, with what it leaves to be copied: the tokenizer and its like."""
    return complete(request.param, tmp_path)


def complete(name: str, tmp_path: Path) -> Path:
    target = tmp_path / name
    if name in KEPT_THIN:
        return thin.whole(name, target)
    dense = FIXTURES / f"{name.partition('-')[0]}-bf16"
    ignored = shutil.ignore_patterns("model.safetensors", "config.json")
    shutil.copytree(dense, target, ignore=ignored)
    return Path(shutil.copytree(FIXTURES / "modelopt" / name, target, dirs_exist_ok=True))


def schemes_of(name: str) -> set[str]:
    return SCHEMES[name] if name in WHOLE else FORMS[name.partition("-modelopt-")[2]]


def expected_of(folder: Path) -> dict[str, str]:
    """ModelOpt's digests of matrices and, under `rounded`, of what it rounds some numbers to."""
    with safe_open(folder / "expected.safetensors", "pt") as file:
        return dict(file.metadata())


def digest(tensor: Tensor) -> str:
    return hashlib.sha256((tensor + 0.0).numpy().tobytes()).hexdigest()  # one zero for both


@pytest.mark.parametrize("folder", MADE, indirect=True)
def test_every_matrix_is_what_modelopts_classes_decode(folder: Path) -> None:
    model, report = load_model(folder, dtype=torch.float32)
    assert report.plan is not None
    digests = expected_of(folder)
    del digests["rounded"]
    quantized = [read for read in report.plan.sites if "weight_scale" in read.stored]
    assert {read.stored_as for read in quantized} <= schemes_of(folder.name)
    for read in quantized:
        module = read.stored["weight"].name.removesuffix(".weight")
        assert digest(matrix(model, read).dense(torch.float32)) == digests.pop(module), module
    assert not digests


@pytest.mark.parametrize("folder", MADE, indirect=True)
def test_activations_are_rounded_as_modelopt_rounds_them(folder: Path) -> None:
    """To the last bit; and so does what the oracle of the next test is made of."""
    model, report = load_model(folder, dtype=torch.float32)
    algorithm = config_of(folder)["quantization_config"]["quant_algo"]
    parts = parts_of(folder)
    wanted = dict(zip(sorted(parts), expected_of(folder)["rounded"].split(), strict=True))
    for read in report.plan.sites:
        if "weight_scale" in read.stored:
            module = read.stored["weight"].name.removesuffix(".weight")
            x = numbers(read.site.in_features)
            for rounding in (inputs_of(model, read), rounding_of(parts[module], algorithm)):
                assert digest(rounding(x))[:8] == wanted[module], module


@pytest.mark.parametrize("folder", MADE, indirect=True)
def test_answers_are_those_of_an_oracle_that_rounds_the_same(folder: Path, tmp_path: Path) -> None:
    same_logits(folder, oracle(folder, tmp_path / "oracle"))


@pytest.mark.parametrize("folder", MADE, indirect=True)
def test_answers_left_to_themselves_are_those_of_modelopts_arithmetic(folder: Path) -> None:
    with safe_open(folder / "expected.safetensors", "pt") as file:
        expected = file.get_tensor("logits").float()
        worst, mean = file.get_tensor("spread").tolist()
    with LLM(folder, dtype="float32") as llm:
        found = llm.logits(TOKENS, [])[-len(expected) :]
    # Sums in another order move an activation in its last bits, one in a million is rounded to the
    # other side then, and all that follows moves with it: ModelOpt's arithmetic is as far from
    # itself.
    apart = 1 - cosine_similarity(found.double(), expected.double(), dim=-1)
    assert apart.max() < max(1e-4, 2 * worst)
    assert apart.mean() < max(1e-4, 2 * mean)


@pytest.mark.parametrize("name", [n for n in WHOLE if any("inputs" in s for s in SCHEMES[n])])
def test_weights_only_leaves_activations_as_they_are(name: str, tmp_path: Path) -> None:
    folder = complete(name, tmp_path)
    assert inspect_checkpoint(folder, weights_only=True).loads
    with LLM(folder, dtype="float32") as llm:
        recipe = llm.logits(TOKENS, [])
    with LLM(folder, dtype="float32", weights_only=True) as llm:
        exact = llm.logits(TOKENS, [])
    alike = cosine_similarity(recipe, exact, dim=-1).mean()
    assert 0.4 < alike < 0.9999


def test_smoothing_comes_before_rounding(tmp_path: Path) -> None:
    """Multiply, round, and the correction from what is not rounded: in this order."""
    model, _ = load_model(complete("31b-nvfp4-svd", tmp_path), dtype=torch.float32)
    weight = model.get_submodule(f"{MLP}.down_proj").weight
    assert isinstance(weight, SmoothedWeight)
    assert isinstance(weight.inner, CorrectedWeight)
    assert isinstance(weight.inner.inner, RoundedWeight)
    x = torch.randn(3, weight.in_features)
    smooth = x * weight.scale.float()
    rounded = weight.inner.inner
    expected = rounded.inputs(smooth) @ rounded.weight.dense(torch.float32).T
    expected += smooth @ weight.inner.down.float().T @ weight.inner.up.float().T
    torch.testing.assert_close(weight.linear(x), expected, rtol=1e-5, atol=1e-5)
    whole = weight.dense(torch.float32)
    merged = (
        rounded.weight.dense(torch.float32) + weight.inner.up.float() @ weight.inner.down.float()
    )
    assert torch.equal(whole, merged * weight.scale.float())
    check(SmoothedWeight(CorrectedWeight(rounded.weight, weight.inner.down, weight.inner.up),
                         weight.scale), whole)  # fmt: skip


def test_scales_of_the_kv_cache_are_dropped_and_said(tmp_path: Path) -> None:
    """SGLang #25792, TensorRT-LLM #16797: `k_proj.k_scale`, and `v_proj.v_scale` without a V."""
    plan = plan_of(complete("31b-fp8-rows-kv", tmp_path))
    dropped = {drop.tensor.name for drop in plan.dropped}
    assert "model.language_model.layers.1.self_attn.k_proj.k_scale" in dropped
    assert "model.language_model.layers.2.self_attn.v_proj.v_scale" in dropped  # its V is its K
    assert len(dropped) == 12
    assert any("kv_cache_scheme is not used" in note.detail for note in plan.notes)


def pairs(values: Tensor) -> Tensor:
    """Integers as section 2.6 has them: the even row in the low half, two's complement."""
    low, high = values[0::2] & 15, values[1::2] & 15
    return (low | high << 4).to(torch.uint8)


@pytest.mark.parametrize(("out", "width", "group"), [(2, 32, 32), (6, 96, 32), (10, 48, 16)])
def test_integers_by_row_pairs(out: int, width: int, group: int) -> None:
    torch.manual_seed(out)
    values = torch.randint(-8, 8, (out, width))
    scales = torch.rand(out, width // group) + 0.1
    stored = {"weight": pairs(values), "weight_scale": scales}
    expected = values * scales.repeat_interleave(group, dim=1)
    site = Site("w", "linear", out, width)
    check(RowPairs(group).build(stored, site), expected)
    swapped = stored | {"weight": (stored["weight"] << 4) | (stored["weight"] >> 4)}
    other = RowPairs(group).build(swapped, site).dense(torch.float32)
    assert not torch.allclose(other, expected, atol=0.1)


def reciprocal(leaf: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[f"{MLP}.down_proj.{leaf}"] = 1 / tensors[f"{MLP}.down_proj.{leaf}"]

    return change


@pytest.mark.parametrize("name", ["26b-nvfp4", "31b-w4a8-awq"])
def test_compressed_tensors_convention_is_refused(tmp_path: Path, name: str) -> None:
    """modular #6697: the global scale the other way round."""
    source = FIXTURES / "modelopt" / name
    folder = altered(tmp_path, source, reciprocal("weight_scale_2"))
    assert inspect_checkpoint(folder).loads
    with pytest.raises(LoadError, match=r"layers\.1\.mlp\.down_proj\.weight_scale_2.*reciprocal"):
        load_model(folder, dtype=torch.float32)


SOURCE = FIXTURES / "modelopt" / "31b-w4a16-awq"


def saying(**changes: object) -> Callable[[Config], object]:
    return lambda config: config["quantization_config"].update(changes)


def silent(config: Config) -> None:
    del config["quantization_config"]


def beside(folder: Path, **changes: object) -> None:
    path = folder / "hf_quant_config.json"
    said = json.loads(path.read_text())
    said["quantization"].update(changes)
    path.write_text(json.dumps(said))


def test_hf_quant_config_alone_says_as_much(tmp_path: Path) -> None:
    name = "26b-mixed"
    source = FIXTURES / "modelopt" / name
    folder = altered(tmp_path, source, config=silent)
    alone, both = inspect_checkpoint(folder), inspect_checkpoint(source)
    assert alone.plan is not None
    assert both.plan is not None
    assert not alone.plan.problems
    found = [(r.site.name, r.part, r.stored_as) for r in alone.plan.sites]
    assert found == [(r.site.name, r.part, r.stored_as) for r in both.plan.sites]


def test_hf_quant_config_that_contradicts_config_json_is_noted(tmp_path: Path) -> None:
    folder = altered(tmp_path, SOURCE)
    beside(folder, quant_algo="NVFP4", exclude_modules=["lm_head"])
    report = inspect_checkpoint(folder)
    assert report.loads
    said = [note.detail for note in report.notes]
    assert any("hf_quant_config.json says quant_algo 'NVFP4', config.json 'W4A16_AWQ'" in d
               for d in said)  # fmt: skip
    assert any("exclude_modules" in detail for detail in said)


def test_hf_quant_config_fills_in_what_config_json_leaves_out(tmp_path: Path) -> None:
    def forget(config: Config) -> None:
        del config["quantization_config"]["quant_algo"]

    folder = altered(tmp_path, FIXTURES / "modelopt" / "26b-nvfp4", config=forget)
    report = inspect_checkpoint(folder)
    assert report.loads
    assert {row.scheme for row in report.groups if row.group == "experts"} == {
        "nvfp4 modelopt, inputs fp4 g16 e4m3"
    }


def spelled(wrapper: str) -> Callable[[Config], object]:
    """`quantized_layers` in the spelling of an engine or of the text model alone."""

    def change(config: Config) -> None:
        layers = config["quantization_config"]["quantized_layers"]
        renamed = {n.replace("model.language_model.", wrapper): a for n, a in layers.items()}
        config["quantization_config"]["quantized_layers"] = renamed

    return change


@pytest.mark.parametrize("wrapper", ["language_model.model.", "model."])
def test_quantized_layers_name_parents_in_any_spelling(tmp_path: Path, wrapper: str) -> None:
    """vLLM #48563: `...layers.N.experts`, whose matrices were taken for unquantized."""
    source = FIXTURES / "modelopt" / "26b-mixed"
    plan = plan_of(altered(tmp_path, source, config=spelled(wrapper)))
    assert not plan.problems
    experts = {read.stored_as for read in plan.sites if ".experts." in read.site.name}
    assert experts == {"nvfp4 modelopt, inputs fp4 g16 e4m3"}
    assert not [note for note in plan.notes if "matches nothing" in note.detail]


def refused(folder: Path) -> str:
    report = inspect_checkpoint(folder)
    assert not report.loads
    return report.text()


MALFORMED = {
    "an algorithm of another time": (saying(quant_algo="W4A8_NVFP4_FP8"), "W4A8_NVFP4_FP8"),
    "groups of text": (saying(group_size="32"), "'32' is not supported"),
    "nothing mixed": (
        saying(quant_algo="MIXED_PRECISION", quantized_layers={f"{MLP}.x": {"quant_algo": "X"}}),
        "matches nothing",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_claims_that_say_nothing_known(tmp_path: Path, case: str) -> None:
    change, wanted = MALFORMED[case]
    text = inspect_checkpoint(altered(tmp_path, SOURCE, config=change)).text()
    assert wanted in text


def without(leaf: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(n) for n in list(tensors) if n == f"{MLP}.down_proj.{leaf}"]


def cut(leaf: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        name = f"{MLP}.down_proj.{leaf}"
        tensors[name] = tensors[name][..., :-1].contiguous()

    return change


MISFITS: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no input scale": ("e2b-fp8", without("input_scale"), "--weights-only does without"),
    "no scale": ("31b-w4a16-awq", without("weight_scale"), "weight_scale is missing"),
    "smoothing cut": ("31b-w4a16-awq", cut("pre_quant_scale"), "pre_quant_scale has shape"),
    "half a correction": ("31b-nvfp4-svd", without("svdquant_lora_b"), "svdquant_lora_b"),
    "a block too few": ("26b-nvfp4", cut("weight_scale"), "weight_scale has shape"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, case: str) -> None:
    name, change, wanted = MISFITS[case]
    source = FIXTURES / "modelopt" / name
    renamed = altered(tmp_path / "a", source, plain_names)
    text = refused(altered(tmp_path / "b", renamed, change))
    assert f"{MLP}.down_proj" in text
    assert wanted in text


def plain_names(tensors: Tensors) -> None:
    """Corrections under the names that ModelOpt's documentation gives them."""
    for name in [n for n in tensors if "_svdquant_lora_" in n]:
        tensors[name.replace("weight_quantizer._", "")] = tensors.pop(name)


def test_both_spellings_of_corrections_are_the_same(tmp_path: Path) -> None:
    source = FIXTURES / "modelopt" / "31b-nvfp4-svd"
    folder = altered(tmp_path, source, plain_names)
    assert set(tensors_of(folder)) != set(tensors_of(source))
    assert not plan_of(folder).problems


def test_the_fixtures_are_all_here() -> None:
    assert set(WHOLE) == set(SCHEMES)
    assert {name.partition("-modelopt-")[2] for name in KEPT_THIN} <= set(FORMS)
