"""A configuration that contradicts the tensors is refused with both values, and others by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DENSE, FIXTURES, Config, altered, load_model

from cabochon.config import parse_config
from cabochon.errors import ConfigError, LoadError
from cabochon.load.report import inspect_checkpoint

MOE, UNIFIED = FIXTURES / "26b-bf16", FIXTURES / "12b-bf16"
W4A16 = FIXTURES / "31b-w4a16"


def text(**changes: object) -> Callable[[Config], object]:
    return lambda config: config["text_config"].update(changes)


def vision(**changes: object) -> Callable[[Config], object]:
    return lambda config: config["vision_config"].update(changes)


def audio(**changes: object) -> Callable[[Config], object]:
    return lambda config: config["audio_config"].update(changes)


def full_heads(**changes: object) -> Callable[[Config], object]:
    def change(config: Config) -> None:
        for layer in config["text_config"]["per_layer_config"].values():
            layer.update(changes)

    return change


SAID = {
    "hidden size": (DENSE, text(hidden_size=96), "text hidden_size is 96", "has 64"),
    "quantized": (W4A16, text(hidden_size=96), "text hidden_size is 96", "has 64"),
    "vocabulary": (DENSE, text(vocab_size=512), "vocab_size is 512", "has 384"),
    "heads": (DENSE, text(num_attention_heads=8), "num_attention_heads is 8", "has 4"),
    "key heads": (
        MOE,
        text(num_key_value_heads=4),
        "num_key_value_heads of sliding layers is 4",
        "has 2",
    ),
    "head size": (DENSE, text(head_dim=32), "head_dim of sliding layers is 32", "has 16"),
    "full head size": (MOE, full_heads(head_dim=64), "head_dim of full layers is 64", "has 32"),
    "width": (DENSE, text(intermediate_size=128), "text intermediate_size is 128", "has 96"),
    "experts": (MOE, text(num_experts=16), "num_experts is 16", "has 8"),
    "expert width": (MOE, text(moe_intermediate_size=64), "moe_intermediate_size is 64", "has 32"),
    "inputs of layers": (
        DENSE,
        text(hidden_size_per_layer_input=64),
        "hidden_size_per_layer_input is 64",
        "has 32",
    ),
    "their vocabulary": (
        DENSE,
        text(vocab_size_per_layer_input=512),
        "vocab_size_per_layer_input is 512",
        "has 384",
    ),
    "vision size": (DENSE, vision(hidden_size=64), "vision hidden_size is 64", "has 32"),
    "vision layers": (DENSE, vision(num_hidden_layers=3), "vision num_hidden_layers is 3", "has 2"),
    "vision width": (DENSE, vision(intermediate_size=32), "intermediate_size is 32", "has 64"),
    "position table": (
        DENSE,
        vision(position_embedding_size=512),
        "position_embedding_size is 512",
        "has 256",
    ),
    "position table of patches": (
        UNIFIED,
        vision(mm_posemb_size=512),
        "mm_posemb_size is 512",
        "has 256",
    ),
    "patches": (
        UNIFIED,
        vision(patch_size=8),
        "(patch_size * pooling_kernel_size)^2 is 1728",
        "6912",
    ),
    "frames": (UNIFIED, audio(audio_embed_dim=320), "audio_embed_dim is 320", "has 640"),
    "convolutions": (
        DENSE,
        audio(subsampling_conv_channels=[128, 4]),
        "subsampling_conv_channels[1] is 4",
        "has 2",
    ),
    "audio layers": (DENSE, audio(num_hidden_layers=1), "audio num_hidden_layers is 1", "has 2"),
    "kernel": (DENSE, audio(conv_kernel_size=7), "conv_kernel_size is 7", "has 5"),
}


@pytest.mark.parametrize("case", SAID)
def test_a_contradiction_is_named_with_both_values(tmp_path: Path, case: str) -> None:
    source, change, said, found = SAID[case]
    report = inspect_checkpoint(altered(tmp_path, source, config=change))
    assert not report.loads
    problems = [p for p in report.problems if p.kind == "CONFIG"]
    assert len(problems) == 1, problems
    assert said in problems[0].detail
    assert found in problems[0].detail
    assert report.text().splitlines()[2].startswith("  CONFIG  config.json")


def layers(count: int) -> Callable[[Config], object]:
    kinds = ["sliding_attention"] * (count - 1) + ["full_attention"]
    return text(num_hidden_layers=count, layer_types=kinds, per_layer_config={})


def test_another_number_of_layers(tmp_path: Path) -> None:
    report = inspect_checkpoint(altered(tmp_path, FIXTURES / "31b-bf16", config=layers(7)))
    details = [p.detail for p in report.problems if p.kind == "CONFIG"]
    assert "text num_hidden_layers is 7, but the file has 6" in details


def test_what_agrees_is_not_questioned(tmp_path: Path) -> None:
    """A file with another problem is not blamed on its configuration."""

    def lose(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.language_model.layers.3.mlp.up_proj.weight"]

    for source in (DENSE, MOE, UNIFIED, FIXTURES / "31b-bf16"):
        report = inspect_checkpoint(altered(tmp_path / source.name, source, lose))
        assert [problem.kind for problem in report.problems] == ["MISSING"]


FOREIGN = {
    "Gemma4DSparkForCausalLM": "a drafter",
    "DSparkGemma4ForCausalLM": "a drafter",
    "DiffusionGemmaForCausalLM": "a diffusion model",
    "DiffusionGemma4ForConditionalGeneration": "a diffusion model",
    "EmbeddingGemma2Model": "an embedding model",
    "Gemma4ForSequenceClassification": "a part of Gemma 4 that does not write text",
    "Gemma3ForConditionalGeneration": "an earlier generation of Gemma",
    "Gemma3nForConditionalGeneration": "an earlier generation of Gemma",
    "Gemma2ForCausalLM": "an earlier generation of Gemma",
    "LlamaForCausalLM": "no Gemma 4",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_architectures_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """A checkpoint that can be read, of something else: refused, status 1, and said what it is."""
    folder = altered(tmp_path, DENSE, config=lambda c: c.update(architectures=[name]))
    report = inspect_checkpoint(folder)
    described: dict[str, Any] = json.loads(json.dumps(report.as_dict()))
    assert described["verdict"] == "refused"
    assert described["architecture"] == name
    assert described["groups"] == []
    (problem,) = described["problems"]
    assert problem["kind"] == "FOREIGN"
    assert f"{name!r} is {FOREIGN[name]}" in report.text()
    with pytest.raises(LoadError) as error:
        load_model(folder, dtype=torch.float32)
    assert str(error.value) == report.text()
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "big"}, "config.json: hidden_size is 'big', expected an integer"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers is 0, expected at least 1"),
        ({"attention_bias": True}, "config.json: attention_bias is True"),
        ({"rope_parameters": []}, "config.json: rope_parameters is"),
    ],
)
def test_places_in_a_text_only_configuration(change: dict[str, Any], message: str) -> None:
    raw = json.loads((DENSE / "config.json").read_text())["text_config"]
    raw |= {"architectures": ["Gemma4ForCausalLM"]} | change
    with pytest.raises(ConfigError) as error:
        parse_config(raw)
    assert str(error.value).startswith(message)
