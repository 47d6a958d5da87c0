"""MLX against mlx-vlm, which converted the fixtures, and `mlx.core.dequantize`, which decoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import thin
import torch
from changes import quantization
from checkpoints import Config, Tensors, altered, plan_of
from dequantized import check_answers, check_matrices
from known import load, refusal

from cabochon.errors import ConfigError
from cabochon.load.report import inspect_checkpoint

FOURS = ("e2b-mlx4", "12b-mlx4", "26b-mlx4", "31b-mlx4")
SCHEMES = {
    **{name: {"mlx int4 g32"} for name in FOURS},
    "26b-mlx4": {"mlx int4 g32", "mlx int8 g64"},
    "e2b-mlx-mixed": {
        "mlx int2 g32",
        "mlx int3 g32",
        "mlx int4 g32",
        "mlx int5 g32",
        "mlx int6 g64",
        "mlx int8 g32",
        "mlx int8 g64",
        "mlx mxfp4",
        "mlx mxfp8",
    },
    "e2b-mlx-mxfp4": {"mlx mxfp4"},
    "e2b-mlx-nvfp4": {"mlx nvfp4"},
    "26b-mlx-mxfp8": {"mlx mxfp8", "mlx int8 g64"},
}
# Every mode on the other architectures, in experts too.
FEW = ("12b-mlx-few", "26b-mlx-few", "31b-mlx-few")
SCHEMES |= {name: SCHEMES["e2b-mlx-mixed"] - {"mlx int4 g32"} | {"mlx nvfp4"} for name in FEW}
LAYER = "language_model.model.layers.0"
UP = f"{LAYER}.mlp.up_proj"
CONV = "audio_tower.subsample_conv_projection.layer1.conv.weight"


@pytest.mark.parametrize("name", SCHEMES)
def test_matrices_are_mlxs(name: str, tmp_path: Path) -> None:
    """Convolutions too, which have their channels last: every parameter is the source's."""
    folder = thin.whole(name, tmp_path)
    check_matrices(name, folder)
    assert {read.scheme.name for read in plan_of(folder).sites} == {"bf16", *SCHEMES[name]}
    report = inspect_checkpoint(folder)
    assert not report.notes, report.text()


@pytest.mark.parametrize("name", SCHEMES)
def test_answers(name: str, tmp_path: Path) -> None:
    folder = thin.whole(name, tmp_path / "made")
    check_answers(folder, thin.source_of(thin.THIN / name), tmp_path)


def test_convolutions_as_upstream_has_them(tmp_path: Path) -> None:
    """Some converted files were not converted in this: their shapes say so."""
    made = thin.whole("e2b-mlx4", tmp_path / "made")

    def back(tensors: Tensors) -> None:
        for name in [n for n in tensors if "conv" in n and tensors[n].ndim > 2]:
            tensors[name] = tensors[name].movedim(-1, 1)

    other = altered(tmp_path / "other", made, tensors=back)
    assert tuple(thin.tensors_of(other)[CONV].shape) == (2, 128, 3, 3)
    check_matrices("e2b-mlx4", other)


def test_a_convolution_of_neither_shape(tmp_path: Path) -> None:
    made = thin.whole("e2b-mlx4", tmp_path / "made")
    turned = lambda t: t.update({CONV: t[CONV].movedim(1, 0)})  # noqa: E731
    text = refusal(altered(tmp_path / "x", made, tensors=turned))
    assert f"{CONV}" in text
    assert "has shape [3, 2, 3, 128], expected [2, 128, 3, 3]" in text


def test_overrides_that_are_lost_are_told_and_do_no_harm(tmp_path: Path) -> None:
    """Widths follow from shapes; the configuration only has its say."""
    made = thin.whole("e2b-mlx-mixed", tmp_path / "made")

    def flat(config: Config) -> None:
        config["quantization"] = {"group_size": 32, "bits": 4}
        config["quantization_config"] = config["quantization"]

    other = altered(tmp_path / "other", made, config=flat)
    check_matrices("e2b-mlx-mixed", other)
    assert "says mlx int4 g32, the tensors are mlx int8 g32: loaded so" in (
        inspect_checkpoint(other).text()
    )


def test_negated_and_missing_biases_are_other_numbers(tmp_path: Path) -> None:
    made = thin.whole("e2b-mlx4", tmp_path / "made")
    negated = lambda t: t.update({f"{UP}.biases": -t[f"{UP}.biases"]})  # noqa: E731
    with pytest.raises(AssertionError, match="up_proj"):
        check_matrices("e2b-mlx4", altered(tmp_path / "a", made, tensors=negated))
    reciprocal = lambda t: t.update({f"{UP}.scales": 1 / t[f"{UP}.scales"]})  # noqa: E731
    with pytest.raises(AssertionError, match="up_proj"):
        check_matrices("e2b-mlx4", altered(tmp_path / "b", made, tensors=reciprocal))
    lost = refusal(altered(tmp_path / "c", made, tensors=lambda t: t.pop(f"{UP}.biases")))
    assert "biases is missing" in lost


def test_swapped_nibbles_are_other_numbers(tmp_path: Path) -> None:
    made = thin.whole("e2b-mlx4", tmp_path / "made")

    def swap(tensors: Tensors) -> None:
        octets = tensors[f"{UP}.weight"].view(torch.uint8)
        tensors[f"{UP}.weight"] = (octets >> 4 | octets << 4).view(torch.uint32)

    with pytest.raises(AssertionError, match="up_proj"):
        check_matrices("e2b-mlx4", altered(tmp_path / "x", made, tensors=swap))


def test_one_expert_too_few(tmp_path: Path) -> None:
    made = thin.whole("26b-mlx4", tmp_path / "made")
    stack = f"{LAYER}.experts.switch_glu.up_proj"

    def shorten(tensors: Tensors) -> None:
        for leaf in ("weight", "scales", "biases"):
            tensors[f"{stack}.{leaf}"] = tensors[f"{stack}.{leaf}"][:-1]

    text = refusal(altered(tmp_path / "x", made, tensors=shorten))
    assert "parts are not stored, first 7.up_proj" in text


@pytest.mark.parametrize("count", [0, 9, 10**9])
def test_stacks_of_no_expert_and_of_too_many(tmp_path: Path, count: int) -> None:
    """A shape with a zero in it takes no bytes, so that any header can say a billion."""
    made = thin.whole("26b-mlx4", tmp_path / "made")
    name = f"{LAYER}.experts.switch_glu.up_proj.more"

    def add(tensors: Tensors) -> None:
        tensors[name] = torch.empty(count, 0, 1)

    text = refusal(altered(tmp_path / "x", made, tensors=add))
    assert f"UNUSED  {name}" in text


def test_scales_that_are_no_numbers(tmp_path: Path) -> None:
    """0x7F is no number as E4M3, and a power of two as E8M0."""
    made = thin.whole("e2b-mlx-nvfp4", tmp_path / "made")

    def damage(tensors: Tensors) -> None:
        tensors[f"{UP}.scales"][0, 0] = 0x7F

    text = refusal(altered(tmp_path / "x", made, tensors=damage))
    assert f"{UP}.scales" in text
    assert "not finite" in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mode": "fp3"}, "MLX's mode 'fp3' is not supported"),
        ({"bits": 7}, "quantization has bits 7 and group_size 32"),
        ({"group_size": "32"}, "quantization.group_size is '32', expected a whole number"),
        ({UP: {"bits": 0, "group_size": 32}}, f"{UP} has bits 0"),
    ],
)
def test_claims_that_cannot_be(tmp_path: Path, values: dict[str, object], words: str) -> None:
    made = thin.whole("e2b-mlx4", tmp_path / "made")
    assert words in refusal(altered(tmp_path / "x", made, config=quantization(**values)))


def test_a_weight_only_bf16_file_of_mlx(tmp_path: Path) -> None:
    """Without `quantization` nothing is claimed, and the names are enough."""
    made = thin.whole("e2b-mlx4", tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    source = thin.tensors_of(thin.source_of(thin.THIN / "e2b-mlx4"))
    del config["quantization"], config["quantization_config"]
    plain = {thin.mlx(name): tensor for name, tensor in source.items()}
    folder = thin.write(tmp_path / "plain", plain, config)
    found = load(folder)[1]
    name = "model.language_model.layers.0.mlp.up_proj"
    assert torch.equal(found[name].dense(torch.bfloat16), source[f"{name}.weight"])


def test_no_error_type_but_ours(tmp_path: Path) -> None:
    made = thin.whole("e2b-mlx4", tmp_path / "made")
    change = quantization(bits=None, group_size=None)
    with pytest.raises(ConfigError, match="has bits None"):
        inspect_checkpoint(altered(tmp_path / "x", made, config=change))
