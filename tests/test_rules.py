"""Rules of a quantization configuration: they match as Python's `re` does, in bounded time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import W4A16, altered

from cabochon.errors import ConfigError
from cabochon.load.report import inspect_checkpoint
from cabochon.quant.claims import Targets
from cabochon.quant.scheme import Site

# As compressed-tensors, llm-compressor recipes and vLLM's documentation have them.
REAL = (
    ".*vision_tower.*",
    ".*lm_head",
    r"model\.layers\.\d+\.mlp\.(gate|up)_proj$",
    r".*layers\.([0-9]|1[0-4])\.self_attn\.(?:q|k|v|o)_proj",
    r"(?:model\.)?(?:language_model\.)?layers\.\d{1,2}\..*_proj",
    r"^(?!.*(vision|audio)).*proj$",
    r".*(?<!gate)_proj\b",
    r".*mlp\.gate$",
    r".*experts\.\d+\.(w1|w2|w3)",
    "",
)
NAMES = (
    "lm_head",
    "model.layers.11.mlp.gate_proj",
    "model.language_model.layers.3.self_attn.q_proj",
    "language_model.layers.14.mlp.up_proj",
    "model.language_model.layers.3.mlp.gate",
    "model.language_model.layers.3.experts.17.w2",
    "model.vision_tower.encoder.layers.0.mlp.up_proj.linear",
    "model.audio_tower.output_proj",
    "line\n",
    "",
)


@pytest.mark.parametrize("expression", REAL)
def test_rules_that_are_in_use(expression: str) -> None:
    for name in NAMES:
        found = Targets.of([f"re:{expression}"]).first(Site("x", "linear", 1, 1), [name])
        assert (found is not None) == bool(re.match(expression, name)), name


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("(", "is no regular expression"),
        ("a{99999999999999999999}", "is no regular expression"),
        (r"(?:\w|\w\w|\.)+[!?]", "takes longer than 1 s"),
        (r"(?:.|..)+[\x01\x02]$", "takes longer than 1 s"),
    ],
)
def test_rules_that_cannot_be_used_are_named(tmp_path: Path, expression: str, why: str) -> None:
    """A rule that backtracks without end would hang `inspect` and `serve`."""
    rule = f"re:{expression}"
    change = lambda c: c["quantization_config"]["ignore"].append(rule)  # noqa: E731
    with pytest.raises(ConfigError, match=why) as error:
        inspect_checkpoint(altered(tmp_path, W4A16, config=change))
    assert repr(rule) in str(error.value)


def test_lists_of_any_length_are_matched(tmp_path: Path) -> None:
    """Quantizers write thousands of names, one for each expert; patterns are few."""
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(100_000)]

    def ignoring(*rules: str) -> Path:
        return altered(
            tmp_path, W4A16, config=lambda c: c["quantization_config"]["ignore"].extend(rules)
        )

    assert inspect_checkpoint(ignoring(*names)).loads
    with pytest.raises(ConfigError, match="1001 patterns, more than 1000"):
        inspect_checkpoint(ignoring(*(f"re:{name}" for name in names[:1001])))
