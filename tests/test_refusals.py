"""Checkpoints that would not load exactly right are refused, and the message names the culprit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoints import (
    ASYMMETRIC,
    DENSE,
    W4A16,
    Config,
    Tensors,
    altered,
    load_model,
)

from cabochon.checkpoint.folder import Checkpoint
from cabochon.config import read_config
from cabochon.errors import ConfigError, LoadError, UnreadableError
from cabochon.load.planner import build_plan
from cabochon.load.report import inspect_checkpoint, plan_checkpoint

LAYER = "model.language_model.layers.1"
GATE = f"{LAYER}.mlp.gate_proj"
NORM = f"{LAYER}.input_layernorm.weight"


def refusal(folder: Path) -> str:
    """The text with which `folder` is refused, by the plan and by loading alike."""
    report = inspect_checkpoint(folder)
    assert not report.loads
    for use in (plan_checkpoint, partial(load_model, dtype=torch.float32)):
        with pytest.raises(LoadError) as error:
            use(folder)
        assert str(error.value) == report.text()
        assert error.value.exit_code == 1
    return report.text()


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


def drop(*endings: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            del tensors[name]

    return change


def cast(name: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


STORED = {
    "a tensor too many": (DENSE, put(f"{GATE}.bias", torch.ones(96)), "SCHEME", f"{GATE}", "bias"),
    "a bias of queries": (
        DENSE,
        put(f"{LAYER}.self_attn.q_bias", torch.ones(64)),
        "UNUSED",
        "self_attn.q_bias",
    ),
    "an unknown tensor": (DENSE, put(f"{LAYER}.extra", torch.ones(1)), "UNUSED", f"{LAYER}.extra"),
    "a matrix too few": (DENSE, drop(f"{GATE}.weight"), "MISSING", GATE),
    "a matrix too few, but its bias": (
        DENSE,
        drop("audio_tower.output_proj.weight"),
        "MISSING",
        "model.audio_tower.output_proj\n",
    ),
    "a norm too few": (DENSE, drop(NORM), "MISSING", NORM),
    "a wrong shape": (DENSE, put(f"{GATE}.weight", torch.ones(96, 63)), "SHAPE", GATE, "[96, 63]"),
    "a norm of wrong shape": (DENSE, put(NORM, torch.ones(63)), "SHAPE", NORM, "[63]"),
    "doubles": (DENSE, cast(f"{GATE}.weight", torch.float64), "DTYPE", GATE, "F64"),
    "a norm in bytes": (DENSE, cast(NORM, torch.uint8), "DTYPE", NORM, "U8"),
    "packed without scale": (
        W4A16,
        drop(f"{GATE}.weight_scale"),
        "SCHEME",
        GATE,
        "weight_scale is missing",
    ),
    "packed without shape": (W4A16, drop(f"{GATE}.weight_shape"), "weight_shape is missing", GATE),
    "scales alone": (W4A16, drop(f"{GATE}.weight_packed"), "weight_packed is missing", GATE),
    "scale of wrong shape": (
        W4A16,
        put(f"{GATE}.weight_scale", torch.ones(96, 5)),
        GATE,
        "weight_scale has shape [96, 5], expected [out, in/32] = [96, 2]",
    ),
    "float and packed": (
        W4A16,
        put(f"{GATE}.weight", torch.ones(96, 64)),
        GATE,
        "nearest is int4 g32: weight is not part of int4 g32",
    ),
    "a stray scale": (
        DENSE,
        put(f"{GATE}.weight_scale", torch.ones(96, 1)),
        GATE,
        "weight_scale is not part of bf16",
    ),
    "one zero point missing": (
        ASYMMETRIC,
        drop(f"{GATE}.weight_zero_point"),
        GATE,
        "weight_zero_point is missing",
    ),
    "all zero points missing": (
        ASYMMETRIC,
        drop("weight_zero_point"),
        "weight_zero_point is missing",
        "layers.{0-5}.self_attn.q_proj",
    ),
    "no vision tower": (
        DENSE,
        lambda t: [t.pop(n) for n in list(t) if n.startswith("model.vision_tower.")],
        "MISSING",
        "model.vision_tower  x",
    ),
    "half a head": (W4A16, put("lm_head.weight_scale", torch.ones(384, 2)), "lm_head"),
}


@pytest.mark.parametrize("case", STORED)
def test_stored_tensors_that_do_not_fit(tmp_path: Path, case: str) -> None:
    source, change, *wanted = STORED[case]
    text = refusal(altered(tmp_path, source, tensors=change))
    for part in wanted:
        assert part in text


def without(name: str) -> Callable[[Config], object]:
    return lambda config: config.pop(name)


def test_a_missing_tower_is_one_line(tmp_path: Path) -> None:
    _, change, *_ = STORED["no vision tower"]
    report = inspect_checkpoint(altered(tmp_path, DENSE, tensors=change))
    (problem,) = report.problems
    assert problem.where == ("model.vision_tower",)
    assert problem.count > 50


def test_a_partial_set_of_zero_points_is_refused_without_a_claim(tmp_path: Path) -> None:
    lost = drop(f"{GATE}.weight_zero_point")
    folder = altered(tmp_path, ASYMMETRIC, lost, without("quantization_config"))
    text = refusal(folder)
    assert GATE in text
    assert "weight_zero_point is missing, but" in text


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    text = refusal(altered(tmp_path, DENSE, config=lambda c: c.update(tie_word_embeddings=False)))
    assert "lm_head" in text
    assert "tie_word_embeddings is false" in text


def weights(**changes: object) -> Callable[[Config], object]:
    return lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)


def group(**changes: object) -> Callable[[Config], object]:
    return lambda c: c["quantization_config"]["config_groups"]["group_0"].update(changes)


def quantization(**changes: object) -> Callable[[Config], object]:
    return lambda c: c["quantization_config"].update(changes)


SIX = {"num_bits": 6, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True}

CLAIMED = {
    "another method": (quantization(quant_method="awq"), "quant_method 'awq'"),
    "another format": (group(format="marlin-24"), "format 'marlin-24'"),
    "16 bits": (weights(num_bits=16), "16-bit int"),
    "floats": (weights(type="float"), "4-bit float"),
    "blocks": (weights(strategy="block"), "strategy 'block'"),
    "6-bit activations": (group(input_activations=SIX), "input_activations of 6-bit float"),
    "rotations": (quantization(transform_config={"R1": {}}), "transform_config"),
    "no group size": (weights(group_size=None), "group_size is None"),
}


@pytest.mark.parametrize(("change", "message"), CLAIMED.values(), ids=CLAIMED)
def test_claims_that_this_version_cannot_honour(
    tmp_path: Path, change: Callable[[Config], object], message: str
) -> None:
    text = refusal(altered(tmp_path, W4A16, config=change))
    assert message in text
    assert "compressed-tensors" in text  # what to use instead


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(quantization_config=[]), "quantization_config is"),
        (quantization(config_groups=[1]), "config_groups is"),
        (quantization(ignore="lm_head"), "ignore is 'lm_head'"),
        (quantization(ignore=["re:("]), r"'re:\(' is no regular expression"),
        (group(targets=[1]), "targets is"),
        (group(weights=4), "weights is 4"),
        (without("architectures"), "architectures"),
    ],
)
def test_malformed_configurations(
    tmp_path: Path, change: Callable[[Config], object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        inspect_checkpoint(altered(tmp_path, W4A16, config=change))
    assert error.value.exit_code == 2


def rescale(value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[f"{GATE}.weight_scale"][3].fill_(value)


def fill(name: str, value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].fill_(value)


def entry(value: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[f"{GATE}.weight"][5, 7].fill_(value)


VALUES = {
    "a scale that is no number": (W4A16, rescale(float("nan")), f"{GATE}.weight_scale"),
    "an infinite scale": (W4A16, rescale(float("inf")), f"{GATE}.weight_scale"),
    "an entry that is no number": (DENSE, entry(float("nan")), f"{GATE}.weight"),
    "an infinite entry": (DENSE, entry(float("-inf")), f"{GATE}.weight"),
    "a norm that is no number": (DENSE, fill(NORM, float("nan")), NORM),
    "a bound that is no number": (
        DENSE,
        fill("model.vision_tower.encoder.layers.0.mlp.up_proj.input_min", float("nan")),
        "model.vision_tower.encoder.layers.0.mlp.up_proj.input_min",
    ),
    "another shape in words": (
        W4A16,
        put(f"{GATE}.weight_shape", torch.tensor([64, 96])),
        f"{GATE}.weight_shape",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_cannot_be_right(tmp_path: Path, case: str) -> None:
    source, change, name = VALUES[case]
    folder = altered(tmp_path, source, tensors=change)
    with pytest.raises(LoadError) as error:
        load_model(folder, dtype=torch.float32)
    assert repr(name) in str(error.value)
    assert "model.safetensors" in str(error.value)


def test_values_must_be_finite_in_the_dtype_that_computes(tmp_path: Path) -> None:
    folder = altered(tmp_path, DENSE, tensors=fill(NORM, 1e5))
    load_model(folder, dtype=torch.bfloat16)
    with pytest.raises(LoadError, match="not finite in float16"):
        load_model(folder, dtype=torch.float16)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()], ids=["missing", "empty"])
def test_missing_and_empty_folders(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "model")
    for use in (inspect_checkpoint, lambda path: load_model(path, dtype=torch.float32)):
        with pytest.raises(UnreadableError, match=str(tmp_path / "model")) as error:
            use(tmp_path / "model")
        assert error.value.exit_code == 2


def test_a_folder_without_config(tmp_path: Path) -> None:
    (altered(tmp_path, DENSE) / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        inspect_checkpoint(tmp_path)


def test_a_truncated_file(tmp_path: Path) -> None:
    file = altered(tmp_path, DENSE) / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    with pytest.raises(UnreadableError, match="cut off") as error:
        inspect_checkpoint(tmp_path)
    assert str(file) in str(error.value)


def test_vision_in_the_file_alone_is_refused(tmp_path: Path) -> None:
    text = refusal(altered(tmp_path, DENSE, config=lambda c: c.update(vision_config=None)))
    assert "UNUSED" in text
    assert "model.vision_tower.*" in text


def test_any_single_tensor_lost_or_bent_is_noticed() -> None:
    """No tensor of a quantized checkpoint can be spared or reshaped: each in turn, from headers."""
    config, raw = read_config(ASYMMETRIC)
    stored = Checkpoint.open(ASYMMETRIC).tensors
    assert not build_plan(Checkpoint(ASYMMETRIC, stored), config, raw).problems
    for name, meta in stored.items():
        bent = {**stored, name: replace(meta, shape=(1, *meta.shape))}
        lost = {other: stored[other] for other in stored if other != name}
        for metas in (bent, lost):
            assert build_plan(Checkpoint(ASYMMETRIC, metas), config, raw).problems, name
