"""Rules of a quantization configuration: matched as Python's `re` does, but in bounded time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import W4A16, altered
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cabochon.errors import ConfigError
from cabochon.load.report import inspect_checkpoint
from cabochon.quant.regex import Regex, UnsupportedRegex

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
        assert Regex(expression).match(name) == bool(re.match(expression, name)), name


def pieces(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    ends = st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{2,}"])
    return st.one_of(
        st.lists(inner, min_size=2, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, ends).map(lambda two: f"(?:{two[0]}){two[1]}"),
        st.tuples(st.sampled_from(["?=", "?!"]), inner).map(lambda two: f"({two[0]}{two[1]})"),
    )


ATOMS = ("a", "b", ".", r"\w", r"\d", r"\.", "[^a]", "[ab]", "[a-c_]", "^", "$", r"\b", r"\W", "a*")
ATOMS += (r"\B", r"\Z", "b+", ".*", r"\s?", "(?<=a)", "(?<!ab)", "[^\\d.]+", "")


@settings(max_examples=2000, deadline=None)
@given(
    st.recursive(st.sampled_from(ATOMS), pieces, max_leaves=6),
    st.lists(st.text("ab1.\n é", min_size=1, max_size=7), min_size=1, max_size=4),
)
def test_any_expression_matches_as_in_python(expression: str, names: list[str]) -> None:
    try:
        regex = Regex(expression)
    except UnsupportedRegex:  # too deep
        assume(False)
    for name in names:
        assert regex.match(name) == bool(re.match(expression, name)), (expression, name)


SLOW = (r"(\w+\.?)+!", "(a|aa)+!", "(.*)*x", ".*.*.*x", ".?" * 60 + "." * 60 + "x", "(?:a?){99}x")


@pytest.mark.parametrize("expression", SLOW)
def test_no_expression_takes_long(expression: str) -> None:
    """With `re`, most of these would never end."""
    for name in ("a" * 100, "model.layers.10." * 6, "a." * 50):
        assert not Regex(expression).match(name)


REFUSED = {
    "(": "it is no regular expression",
    "a" * 301: "longer than 300",
    r"(a)\1": "groupref is not supported",
    "(?>a)": "atomic group is not supported",
    "a*+": "possessive repeat is not supported",
    "(?i).*ROUTER": "flags are not supported",
    "(?s:.)": "flags are not supported",
    "(((ab)*c)*d)*": "deep",
    "(" * 120 + ")" * 120: "",
    "a{99999999999999999999}": "it is no regular expression",
}


@pytest.mark.parametrize(("expression", "why"), REFUSED.items())
def test_what_is_not_matched_is_refused(tmp_path: Path, expression: str, why: str) -> None:
    rule = f"re:{expression}"
    folder = altered(
        tmp_path, W4A16, config=lambda c: c["quantization_config"].update(ignore=[rule])
    )
    if not why:
        assert inspect_checkpoint(folder).loads
        return
    with pytest.raises(ConfigError, match=why) as error:
        inspect_checkpoint(folder)
    assert repr(rule)[:200] in str(error.value)


def test_a_rule_that_would_hang_is_matched(tmp_path: Path) -> None:
    rule = r"re:(\w+\.?)+!"
    change = lambda c: c["quantization_config"]["ignore"].append(rule)  # noqa: E731
    report = inspect_checkpoint(altered(tmp_path, W4A16, config=change))
    assert report.loads
    assert rule in report.text()


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
