"""`config.json`: values that no model can have are refused by their name in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family
import pytest
from checkpoints import DENSE, FIXTURES, Config, altered, config_of
from transformers import AutoConfig

from cabochon.config import parse_config, read_config
from cabochon.errors import ConfigError
from cabochon.files import read_json_object
from cabochon.load.report import inspect_checkpoint

Change = Callable[[Config], object]


def text(**values: object) -> Change:
    return lambda config: config["text_config"].update(values)


def vision(**values: object) -> Change:
    return lambda config: config["vision_config"].update(values)


def audio(**values: object) -> Change:
    return lambda config: config["audio_config"].update(values)


def rope(kind: str, **values: object) -> Change:
    return lambda config: config["text_config"]["rope_parameters"].update({kind: values})


INFINITE = float("inf")

IMPOSSIBLE = {
    "text_config.rope_parameters.full_attention.partial_rotary_factor is 0.25": rope(
        "full_attention", partial_rotary_factor=0.25
    ),
    "text_config.rope_parameters.sliding_attention.partial_rotary_factor is 0.5": rope(
        "sliding_attention", rope_type="default", partial_rotary_factor=0.5
    ),
    "full_attention.partial_rotary_factor is 3": rope(
        "full_attention", rope_type="proportional", partial_rotary_factor=3
    ),
    "full_attention.partial_rotary_factor is 0": rope(
        "full_attention", rope_type="proportional", partial_rotary_factor=0
    ),
    "sliding_attention.rope_theta is 0": rope(
        "sliding_attention", rope_type="default", rope_theta=0
    ),
    "text_config.rope_scaling is": text(rope_scaling={"type": "yarn", "factor": 8}),
    "text_config.rms_norm_eps is -1": text(rms_norm_eps=-1),
    "text_config.rms_norm_eps is inf": text(rms_norm_eps=INFINITE),
    "text_config.rms_norm_eps is 1000": text(rms_norm_eps=10**400),
    "vision_config.rms_norm_eps is nan": vision(rms_norm_eps=float("nan")),
    "text_config.final_logit_softcapping is -1": text(final_logit_softcapping=-1),
    "text_config.pad_token_id is 384, but vocab_size is 384": text(pad_token_id=384),
    "num_attention_heads is 4, no multiple of the 3": text(num_key_value_heads=3),
    "head_dim is 15, expected an even": text(head_dim=15),
    "vision_config.head_dim is 18, expected a multiple of 4": vision(head_dim=18),
    "audio_config.num_attention_heads is 3": audio(num_attention_heads=3),
    "audio_config.subsampling_conv_channels is [2, 0]": audio(subsampling_conv_channels=[2, 0]),
    "audio_config.attention_logit_cap is 0": audio(attention_logit_cap=0),
    "audio_config.gradient_clipping is -5": audio(gradient_clipping=-5),
    "text_config.num_hidden_layers is 1000000000, expected at most": text(
        num_hidden_layers=10**9, layer_types=None
    ),
    "vision_config.num_hidden_layers is 1000000000": vision(num_hidden_layers=10**9),
    "audio_config.num_hidden_layers is 1000000000": audio(num_hidden_layers=10**9),
    "text_config.num_experts is 1000000000": text(
        enable_moe_block=True, num_experts=10**9, top_k_experts=2, moe_intermediate_size=32
    ),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_values_that_no_model_has(message: str) -> None:
    raw = config_of(DENSE)
    IMPOSSIBLE[message](raw)
    with pytest.raises(ConfigError) as error:
        parse_config(raw)
    assert message in str(error.value)
    assert "config.json" in str(error.value)


def test_heads_of_a_single_layer_must_fit() -> None:
    raw = family.config("31B", per_layer=True)
    raw["text_config"]["per_layer_config"]["05"] = {"num_key_value_heads": 5}
    with pytest.raises(ConfigError, match="no multiple of the 5"):
        parse_config(raw)
    raw = family.config("31B")
    raw["text_config"]["global_head_dim"] = 33
    with pytest.raises(ConfigError, match="global_head_dim is 33, expected an even"):
        parse_config(raw)


@pytest.mark.parametrize("folder", sorted(FIXTURES.glob("*-bf16")), ids=lambda path: path.name)
def test_what_upstream_writes_is_accepted(tmp_path: Path, folder: Path) -> None:
    """Written anew by transformers, with every default spelled out, it is the same model."""
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    assert read_config(tmp_path)[0] == read_config(folder)[0]


def test_31b_exported_with_null_for_what_it_lacks(tmp_path: Path) -> None:
    """Without a width there are no per-layer inputs; upstream's default would be E2B's."""
    raw = family.config("31B")
    raw["text_config"]["hidden_size_per_layer_input"] = None
    assert parse_config(raw) == parse_config(family.config("31B"))
    assert inspect_checkpoint(family.write_headers(tmp_path, family.layout("31B"), raw)).loads


NO_JSON = {
    b'{"a": 1, "a": 2}': "'a' appears twice",
    b'{"a": {"b": 1, "b": 2}}': "'b' appears twice",
    b'{"a": NaN}': "NaN",
    b'{"a": -Infinity}': "-Infinity",
    b'{"a":' * 100_000: "nested too deep",
    b"[" * 100_000: "nested too deep",
    b'{"a": 1': "delimiter",
    b'{"a": "\xff"}': "codec can't decode",
    b"[1]": "holds a list, expected an object",
    b'{"a": ' + b"9" * 5000 + b"}": "digits",
}


@pytest.mark.parametrize(("content", "message"), NO_JSON.items(), ids=NO_JSON.values())
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_one_reader_for_small_files(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    def read() -> Any:
        return read_config(tmp_path) if name == "config.json" else read_json_object(path)

    with pytest.raises(ConfigError, match=message) as error:
        read()
    assert str(path) in str(error.value)


def test_an_index_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    folder = altered(tmp_path, DENSE)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}')
    with pytest.raises(ConfigError, match="'a' appears twice"):
        inspect_checkpoint(folder)


def test_what_is_no_file_is_absent(tmp_path: Path) -> None:
    assert read_json_object(tmp_path / "absent.json") == {}
    assert json.loads((DENSE / "config.json").read_text()) == read_json_object(
        DENSE / "config.json"
    )
