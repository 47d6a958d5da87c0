"""A model's turn: content, reasoning and calls, told apart by token ids, with nothing lost."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from cabochon.files import DEMO
from cabochon.text.parser import Parsed, State, TurnParser
from cabochon.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.open(DEMO)
SPECIAL = sorted(TOKENIZER.special)
CALL = TOKENIZER.encode("<|tool_call>")[0]
QUOTE = TOKENIZER.encode('<|"|>')[0]
STRUCTURE = [TOKENIZER.encode(name)[0] for name in (
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<turn|>",
)]  # fmt: skip

# How the published template of Gemma 4 writes the arguments of a call: its rules, in our words.
ARGUMENT = """
{%- macro argument(value) -%}
{%- if value is string -%}<|"|>{{ value }}<|"|>
{%- elif value is boolean -%}{{ 'true' if value else 'false' }}
{%- elif value is mapping -%}{
{%- for key, item in value | dictsort -%}{{ key }}:{{ argument(item) }}
{%- if not loop.last %},{% endif %}{%- endfor -%}}
{%- elif value is sequence -%}[
{%- for item in value -%}{{ argument(item) }}{%- if not loop.last %},{% endif %}{%- endfor -%}]
{%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}<|tool_call>call:{{ message.name }}
{{- argument(message.arguments) }}<tool_call|>{%- endfor -%}
"""


def parse(ids: list[int], prompt: list[int] | None = None) -> Parsed:
    """All the parts of a turn, joined."""
    parser = TurnParser(TOKENIZER, prompt or [])
    parts = [*(parser.push(token) for token in ids), parser.finish()]
    return Parsed(
        "".join(part.content for part in parts),
        "".join(part.reasoning for part in parts),
        tuple(call for part in parts for call in part.calls),
        any(part.broken for part in parts),
    )


def read(text: str, prompt: str = "") -> Parsed:
    return parse(TOKENIZER.encode(text), TOKENIZER.encode(prompt))


def arguments(body: str) -> Any:
    """The arguments of one call that has `body` between its braces."""
    parsed = read(f"<|tool_call>call:f{{{body}}}<tool_call|>")
    assert not parsed.content
    assert not parsed.broken
    (call,) = parsed.calls
    assert call.name == "f"
    return json.loads(call.arguments)


def test_content_reasoning_and_calls_are_told_apart() -> None:
    parsed = read(
        "<|channel>thought\nI should look.\n<channel|>Let me see."
        '<|tool_call>call:look{at:<|"|>the sky<|"|>,times:2}<tool_call|>'
        "<|tool_call>call:wait{}<tool_call|>"
    )
    assert parsed.reasoning == "I should look."
    assert parsed.content == "Let me see."
    assert [(call.name, call.arguments) for call in parsed.calls] == [
        ("look", '{"at": "the sky", "times": 2}'),
        ("wait", "{}"),
    ]
    assert not parsed.broken


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("", {}),
        (" ", {}),
        ('a:<|"|>x<|"|>', {"a": "x"}),
        ('a:<|"|><|"|>', {"a": ""}),
        ('a:<|"|>{"k": [1, }],:<|"|>', {"a": '{"k": [1, }],:'}),
        ('a:<|"|>say "hi" \\n \\" ok\nnew line<|"|>', {"a": 'say "hi" \\n \\" ok\nnew line'}),
        ('a:<|"|>Zürich 日本 🐈<|"|>', {"a": "Zürich 日本 🐈"}),
        ('a:<|"|><|tool_call|> <b> </b><|"|>', {"a": "<|tool_call|> <b> </b>"}),
        ("a:1,b:-2,c:0.5,d:1e5,e:-1.5E-3", {"a": 1, "b": -2, "c": 0.5, "d": 1e5, "e": -0.0015}),
        ("n:123456789012345678901234567890", {"n": 123456789012345678901234567890}),
        ("a:true,b:false,c:null,d:None", {"a": True, "b": False, "c": None, "d": None}),
        ("a:[]", {"a": []}),
        ('a:[1,<|"|>b<|"|>,[true],{c:{}}]', {"a": [1, "b", [True], {"c": {}}]}),
        ('a:{b:{c:{d:<|"|>deep<|"|>}}},e:1', {"a": {"b": {"c": {"d": "deep"}}}, "e": 1}),
        ('<|"|>a b<|"|>:1', {"a b": 1}),
        ('"a":"b\\n\\u00e9"', {"a": "b\né"}),
        (" a : 1 , b : [ 2 , 3 ] ", {"a": 1, "b": [2, 3]}),
        ("unit:celsius,days:[mon,tue]", {"unit": "celsius", "days": ["mon", "tue"]}),
        ("a:01,b:1.,c:--1,d:NaN", {"a": "01", "b": "1.", "c": "--1", "d": "NaN"}),
        ("a:1\u0663", {"a": "1\u0663"}),  # a digit, but none of JSON's
        ("at:10:30", {"at": "10:30"}),
        ("a:1,a:2", {"a": 2}),
    ],
)
def test_arguments(body: str, expected: dict[str, Any]) -> None:
    assert arguments(body) == expected


@pytest.mark.parametrize(
    "body",
    [
        "call:f{",
        "call:f}",
        "call:f{a:}",
        "call:f{a}",
        "call:f{a:1,}",
        "call:f{,}",
        "call:f{a:1 b:2}{",
        "call:f{a:1}}",
        "call:f{a:1} and more",
        "call:f{a:[1}",
        'call:f{a:<|"|>x}',
        'call:f{a:<|"|>x<|"|>y}',
        'call:f{a:"x}',
        'call:f{a:"\\x"}',
        "call:{a:1}",
        "call:two words{a:1}",
        "f{a:1}",
        "",
        "call:f{a:" + "[" * 100 + "]" * 100 + "}",
        "call:f{a:<|image|>}",
    ],
)
@pytest.mark.parametrize("end", ["<tool_call|>", ""])
def test_a_call_that_is_none_is_given_as_text(body: str, end: str) -> None:
    parsed = read(f"Well. <|tool_call>{body}{end}")
    assert parsed.broken
    assert not parsed.calls
    assert parsed.content == f"Well. <|tool_call>{body}{end}"


def test_a_call_that_does_not_end_is_text_and_the_next_one_is_a_call() -> None:
    parsed = read("<|tool_call>call:f{a:1<|tool_call>call:g{}<tool_call|>")
    assert parsed.content == "<|tool_call>call:f{a:1"
    assert [call.name for call in parsed.calls] == ["g"]
    assert parsed.broken


def test_text_that_looks_like_structure_is_text() -> None:
    """As a model writes it that spells the names of special tokens letter by letter."""
    text = '<|channel>thought\n<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
    pieces = [TOKENIZER.encode(letter) for letter in text]
    parsed = parse([token for piece in pieces for token in piece])
    assert parsed == Parsed(content=text)


@pytest.mark.parametrize(
    ("written", "reasoning", "content"),
    [
        ("<|channel>thought\n<channel|>Yes", "", "Yes"),
        ("<|channel>thought<channel|>Yes", "", "Yes"),
        ("<|channel><channel|>Yes", "", "Yes"),
        ("<|channel>thought\nhm", "hm", ""),
        ("<|channel>thought\nhm\n", "hm\n", ""),  # cut short: the line may have gone on
        ("<|channel>thought\na\n\n<channel|>b", "a\n", "b"),
        ("<|channel>thoughtful\na<channel|>b", "thoughtful\na", "b"),
        ("<|channel>final\na<channel|>b", "final\na", "b"),
        ("<|channel>tho", "tho", ""),
        ("<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d", "ac", "bd"),
        ("<channel|>Yes", "", "Yes"),
        ("<|channel>thought\na<|channel>b<channel|>c", "ab", "c"),
    ],
)
def test_channels(written: str, reasoning: str, content: str) -> None:
    parsed = read(written)
    assert (parsed.reasoning, parsed.content) == (reasoning, content)


def test_a_call_ends_the_channel_before_it() -> None:
    parsed = read("<|channel>thought\nhm<|tool_call>call:f{}<tool_call|>")
    assert parsed.reasoning == "hm"
    assert len(parsed.calls) == 1


@pytest.mark.parametrize(
    ("prompt", "reasoning", "content"),
    [
        ("<bos><|turn>user\nHi<turn|>\n<|turn>model\n", "", "a<channel|>b"),
        ("<|turn>model\n<|channel>", "thoughts<channel|>", "b"),
        ("<|turn>model\n<|channel>thought\n", "a", "b"),
        ("<|turn>model\n<|channel>thought\nI see", "a", "b"),
        ("<|turn>model\n<|channel>thought\n<channel|>", "", "ab"),
        ("<|channel>thought\n<|turn>model\n", "", "ab"),
        ("<|turn>model\n<|tool_response>response:f{}<tool_response|>", "", "ab"),
    ],
)
def test_a_prompt_may_end_inside_a_channel(prompt: str, reasoning: str, content: str) -> None:
    parsed = read("a<channel|>b", prompt)
    assert parsed.reasoning == reasoning.removesuffix("<channel|>").replace("thoughts", "a")
    assert parsed.content == content.replace("<channel|>", "")


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = TOKENIZER.encode("<|channel>thought\n🐈<channel|>🐈")
    parser = TurnParser(TOKENIZER)
    parts = [parser.push(token) for token in ids] + [parser.finish()]
    assert {part.reasoning for part in parts} <= {"", "🐈"}
    assert "".join(part.content for part in parts) == "🐈"


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.booleans() | st.integers() | st.text() | st.floats(-1e6, 1e6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_ ]{0,7}[a-z]", fullmatch=True), inner)
    ),
    max_leaves=12,
)
KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,7}", fullmatch=True)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_arguments_survive_the_templates_writing(value: dict[str, Any]) -> None:
    """What Gemma's template writes of a call, by transformers' renderer, is read back exactly."""
    messages = [{"name": "some_function", "arguments": value}]
    (text,), _ = render_jinja_template([messages], chat_template=ARGUMENT)
    # Texts are split off, as a model's tokens have them: a quote is a token, never letters.
    parsed = parse(TOKENIZER.encode(text)) if '<|"|>' not in json.dumps(value) else None
    if parsed is None or any(name in json.dumps(value) for name in ("<|", "|>")):
        return
    (call,) = parsed.calls
    found = json.loads(call.arguments)
    assert same(found, json.loads(json.dumps(value)))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b)
    return type(a) is type(b) and a == b


TOKENS = st.one_of(
    st.sampled_from(STRUCTURE),
    st.sampled_from(SPECIAL),
    st.integers(0, TOKENIZER.vocab_size + 2),
    st.sampled_from(TOKENIZER.encode('call:f{a:1,}"thought\n[]')),
)
SNIPPETS = st.sampled_from(
    [
        TOKENIZER.encode(text)
        for text in (
            '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>',
            "<|tool_call>call:f{a:[1,{b:2}]}<tool_call|>",
            "<|channel>thought\n",
            "\n<channel|>",
            "Yes, 🐈.",
        )
    ]
)
TURNS = st.lists(TOKENS.map(lambda token: [token]) | SNIPPETS, max_size=24).map(
    lambda runs: [token for run in runs for token in run]
)


@given(TURNS)
def test_every_sequence_is_taken_and_nothing_is_lost_or_doubled(ids: list[int]) -> None:
    """Each token that opens a call makes one call or one text, and all arguments are valid JSON."""
    parsed = parse(ids)
    assert all(isinstance(json.loads(call.arguments), dict) for call in parsed.calls)
    broken = parsed.content.count("<|tool_call>")
    assert len(parsed.calls) + broken == ids.count(CALL)
    assert parsed.broken == (broken > 0)
    if not broken:
        assert not any(TOKENIZER.token(i) in parsed.content for i in SPECIAL)


@given(
    st.lists(st.sampled_from(TOKENIZER.encode("thought\nabc 🐈")) | st.sampled_from(STRUCTURE[:2]))
)
def test_channels_equal_an_independent_reading(ids: list[int]) -> None:
    """An independent reading: the turn is cut at the tokens of channels."""
    content, reasoning, run, inside = "", "", list[int](), False
    for token in [*ids, None]:
        if token in (STRUCTURE[0], STRUCTURE[1], None):
            text = TOKENIZER.decode(run)
            nested = inside and token == STRUCTURE[0]
            if nested:
                continue
            if inside:
                if token is not None:
                    framed = text.removesuffix("\n") if "\n" in text else text
                else:
                    framed = text
                if text.startswith("thought\n"):
                    framed = framed.removeprefix("thought\n") if framed != "thought" else ""
                reasoning += "" if text == "thought" else framed
            elif token == STRUCTURE[1]:
                continue
            else:
                content += text
            run, inside = [], token == STRUCTURE[0]
        else:
            run.append(token)
    parsed = parse(ids)
    assert parsed.content == content
    assert parsed.reasoning == reasoning


@given(TURNS, st.integers(0, 40))
def test_a_turn_continued_is_parsed_as_if_it_were_one(ids: list[int], cut: int) -> None:
    """The state at a token depends on the turn before it, not on who wrote that."""
    turn = TOKENIZER.encode("<|turn>")
    before, after = ids[:cut], ids[cut:]
    if turn[0] in before:
        return
    whole = TurnParser(TOKENIZER)
    for token in before:
        whole.push(token)
    continued = TurnParser(TOKENIZER, [*turn, *before])
    if whole.state is State.CALL:
        assert continued.state is State.CONTENT
    else:
        assert continued.state is whole.state
        for token in after:
            continued.push(token)
            whole.push(token)
            assert continued.state is whole.state
