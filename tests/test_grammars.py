"""Grammars: what they let through obeys the schema, and what they cannot do is refused in time."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.engine.grammar import Grammar, Grammars
from cabochon.engine.guide import Guide, TurnRules
from cabochon.errors import RequestError
from cabochon.files import DEMO
from cabochon.text.call_grammar import Tool, call_grammar
from cabochon.text.parser import State, Structure, TurnParser
from cabochon.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.open(DEMO)
STRUCTURE = Structure.of(TOKENIZER)
ENDS = (1, 5, 13)
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size, ENDS)
CLOSING = frozenset('}],"') | {TOKENIZER.spell([STRUCTURE.quote or 0])}


def written(grammar: Grammar, seed: int, most: int = 500) -> list[int] | None:
    """Tokens that a model without sense draws under the grammar; None if it does not end."""
    rng = random.Random(seed)
    matcher = grammar.start()
    tokens: list[int] = []
    while not matcher.ended and len(tokens) < most:
        allowed = np.flatnonzero(matcher.allowed()).tolist()
        if set(allowed) & set(ENDS) and rng.random() < 0.5:
            return tokens
        closing = [t for t in allowed if TOKENIZER.spell([t])[:1] in CLOSING or t in (12, 15)]
        choice = rng.choice(closing if closing and rng.random() < 0.6 else allowed)
        if choice in ENDS:
            return tokens
        tokens.append(choice)
        matcher.take(choice)
    return tokens if matcher.ended else None


NAMES = st.sampled_from(["a", "B", "c_1", "two words", "dé", "x:y", ""])
LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda n: {"type": "integer", "minimum": n, "maximum": n + 50}, st.integers(-9, 9)),
    st.builds(lambda n: {"type": "string", "minLength": n, "maxLength": n + 3}, st.integers(0, 2)),
    st.just({"type": "string", "pattern": "^[a-c]{1,3}$"}),
    st.just({"enum": ["x", 'say "hi"', "", 5, None, True, [1, "y"], {"k": "v"}]}),
    st.just({"const": "only"}),
    st.just({"type": ["integer", "null"], "maximum": 4}),
)


def _object(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    properties = st.dictionaries(NAMES, inner, max_size=4)
    return properties.flatmap(
        lambda found: st.builds(
            lambda needed: {
                "type": "object",
                "properties": found,
                "required": needed,
                "additionalProperties": False,
            },
            st.lists(st.sampled_from(sorted(found)), unique=True) if found else st.just([]),
        )
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        _object(inner)
        | st.builds(lambda item: {"type": "array", "items": item, "maxItems": 3}, inner)
        | st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(_object(SCHEMAS), st.integers(0, 1000))
def test_a_call_obeys_its_schema(schema: dict[str, Any], seed: int) -> None:
    """Judged by jsonschema, of what the parser makes of the tokens that the grammar allows."""
    grammar = GRAMMARS.lark(call_grammar([Tool("f", schema, bound=True)], STRUCTURE))
    tokens = written(grammar, seed)
    if tokens is None:
        return
    parser = TurnParser(TOKENIZER)
    parts = [*(parser.push(token) for token in tokens), parser.finish()]
    (call,) = [call for part in parts for call in part.calls]
    assert not any(part.content for part in parts)
    jsonschema.validate(json.loads(call.arguments), schema)


@settings(max_examples=40, deadline=None)
@given(_object(SCHEMAS), st.integers(0, 1000))
def test_json_obeys_its_schema(schema: dict[str, Any], seed: int) -> None:
    tokens = written(GRAMMARS.json_schema(schema), seed)
    if tokens is not None:
        jsonschema.validate(json.loads(TOKENIZER.decode(tokens)), schema)


def test_a_schema_may_refer_to_itself() -> None:
    node = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 2},
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
        },
        "required": ["name"],
        "additionalProperties": False,
    }
    schema = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    tool = {"type": "object", "properties": {"tree": {"$ref": "#/$defs/node"}}, "$defs": {
        "node": node}, "required": ["tree"]}  # fmt: skip
    grammar = GRAMMARS.lark(call_grammar([Tool("f", tool, bound=True)], STRUCTURE))
    found = 0
    for seed in range(10):
        tokens = written(grammar, seed)
        if tokens is None:
            continue
        parser = TurnParser(TOKENIZER)
        calls = [call for token in tokens for call in parser.push(token).calls]
        jsonschema.validate(json.loads(calls[0].arguments)["tree"], schema)
        found += 1
    assert found


def nested(depth: int, around: Callable[[Any], Any]) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = around(schema)
    return schema


def bound(parameters: Any) -> Grammar:
    return GRAMMARS.lark(call_grammar([Tool("f", parameters, bound=True)], STRUCTURE))


BOMBS: dict[str, Callable[[], Grammar]] = {
    "powers": lambda: GRAMMARS.regex("((a{1000}){1000}){1000}"),
    "depth": lambda: GRAMMARS.json_schema(nested(400, lambda s: {"properties": {"a": s}})),
    "more depth": lambda: GRAMMARS.json_schema(nested(5000, lambda s: {"items": s})),
    "a circle": lambda: GRAMMARS.json_schema({"$ref": "#"}),
    "nothing": lambda: GRAMMARS.lark("start: start"),
    "size": lambda: GRAMMARS.json_schema({"enum": ["a" * 1000] * 300}),
    "many": lambda: bound({"properties": {f"k{i}": {"type": "integer"} for i in range(3000)}}),
    "depth of a tool": lambda: bound(
        nested(800, lambda s: {"type": "object", "properties": {"a": s}})
    ),
    "a circle of a tool": lambda: bound({"$ref": "#"}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_take_too_much_is_refused_in_time(name: str) -> None:
    begun = time.monotonic()
    with pytest.raises(RequestError) as refused:
        written(BOMBS[name](), 0, most=20)
    assert time.monotonic() - begun < 15
    assert len(str(refused.value)) < 500
    assert "<state>" not in str(refused.value)


def chain(links: int) -> dict[str, Any]:
    """A schema whose definitions each refer to the next one."""
    link = lambda i: {"properties": {"a": {"$ref": f"#/$defs/d{i}"}}, "required": ["a"]}  # noqa: E731
    definitions = {f"d{i}": {"type": "object", **link(i + 1)} for i in range(links)}
    return {"$defs": {**definitions, f"d{links}": {"type": "string"}}, "$ref": "#/$defs/d0"}


CHAINS: dict[str, Callable[[], Grammar]] = {
    "rules": lambda: GRAMMARS.lark(
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(12_000)) + '\nr12000: "c"'
    ),
    "definitions": lambda: GRAMMARS.json_schema(chain(1500)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_long_chains_do_not_end_the_process(name: str) -> None:
    """llguidance descends a chain link by link; at 8 MiB of stack 3,000 rules were the end."""
    matcher = CHAINS[name]().start()
    assert matcher.allowed().any()


def test_a_lenient_schema_is_not_taken_for_a_strict_one() -> None:
    """A schema may not switch off its own enforcement."""
    with pytest.raises(RequestError, match="not"):
        GRAMMARS.json_schema({"not": {"type": "string"}, "x-guidance": {"lenient": True}})


def test_white_space_has_an_end() -> None:
    matcher = GRAMMARS.json_object().start()
    (brace,) = TOKENIZER.encode("{")
    (space,) = TOKENIZER.encode(" ")
    matcher.take(brace)
    assert matcher.allowed()[space]
    matcher.take(space)
    assert not matcher.allowed()[space]


def guide(**rules: Any) -> Guide:
    made = TurnRules(structure=STRUCTURE, special=TOKENIZER.special, **rules)
    return Guide(made, ENDS, TOKENIZER.vocab_size)


def choices(of: Guide, state: State = State.CONTENT) -> set[int]:
    allowed = of.allowed(state)
    return set(range(TOKENIZER.vocab_size)) if allowed is None else set(np.flatnonzero(allowed))


def test_a_forced_call_may_be_thought_about_but_not_put_off() -> None:
    calls = bound({"type": "object"})
    assert choices(guide(calls=calls, must_call=True)) == {STRUCTURE.call}
    thinking = guide(calls=calls, must_call=True, thinking=True, thinking_budget=3)
    assert choices(thinking) == {STRUCTURE.call, STRUCTURE.channel}
    thinking.take(STRUCTURE.channel or 0, State.CONTENT)
    open_ = choices(thinking, State.CHANNEL)
    assert not open_ & {*ENDS, STRUCTURE.channel, STRUCTURE.call}
    for _ in range(3):
        thinking.take(100, State.REASONING)
    assert choices(thinking, State.REASONING) == {STRUCTURE.channel_end}
    thinking.take(STRUCTURE.channel_end or 0, State.REASONING)
    assert choices(thinking) == {STRUCTURE.call}  # no second thoughts


def test_a_bound_text_gives_way_to_a_call_before_it_begins() -> None:
    both = guide(text=GRAMMARS.regex("ab"), calls=bound({"type": "object"}))
    first = choices(both)
    assert STRUCTURE.call in first
    (a,) = TOKENIZER.encode("a")
    assert a in first
    both.take(a, State.CONTENT)
    assert STRUCTURE.call not in choices(both)
    (b,) = TOKENIZER.encode("b")
    both.take(b, State.CONTENT)
    assert both.ended


def test_one_call_ends_a_turn_that_may_have_no_more() -> None:
    one = guide(calls=bound({"type": "object"}), parallel=False)
    state = State.CONTENT
    for token in TOKENIZER.encode("<|tool_call>call:f{}<tool_call|>"):
        assert token in choices(one, state)
        one.take(token, state)
        state = State.CALL
    assert one.ended
    wrong = guide(calls=bound({"type": "object"}))
    wrong.take(STRUCTURE.call or 0, State.CONTENT)
    with pytest.raises(RequestError):
        wrong.take(TOKENIZER.encode("x")[0], State.CALL)


def test_frames_are_not_the_models_to_write() -> None:
    """Pictures, turns and stray ends of channels and calls: an answer of them would be nothing."""
    for rules, kept in (
        ({}, {STRUCTURE.channel}),
        ({"calls": bound({"type": "object"})}, {STRUCTURE.channel, STRUCTURE.call}),
        ({"thinking_budget": 0}, set()),
    ):
        rules = {**rules, "may_be_empty": True}
        assert choices(guide(**rules)) & TOKENIZER.special == kept | {*ENDS}
        inside = choices(guide(**{**rules, "thinking_budget": 9}), State.REASONING)
        assert inside & TOKENIZER.special == (
            (kept - {STRUCTURE.channel}) | {STRUCTURE.channel_end, *ENDS}
        )


def test_a_turn_does_not_end_before_it_has_said_anything() -> None:
    """An answer of nothing, or of an empty channel, is of no use to anybody."""
    free = guide()
    assert not choices(free) & {*ENDS}
    free.take(STRUCTURE.channel or 0, State.CONTENT)
    assert not choices(free, State.CHANNEL) & {*ENDS}
    free.take(STRUCTURE.channel_end or 0, State.CHANNEL)
    assert not choices(free) & {*ENDS}
    free.take(TOKENIZER.encode("x")[0], State.CONTENT)
    assert choices(free) >= {*ENDS}
    assert choices(guide(may_be_empty=True)) >= {*ENDS}


def test_a_budget_that_is_spent_opens_no_second_channel() -> None:
    thrifty = guide(thinking_budget=2)
    assert STRUCTURE.channel in choices(thrifty)
    thrifty.take(STRUCTURE.channel or 0, State.CONTENT)
    thrifty.take(100, State.REASONING)
    thrifty.take(STRUCTURE.channel_end or 0, State.REASONING)
    assert STRUCTURE.channel not in choices(thrifty)


def test_the_grammar_of_a_text_opens_neither_calls_nor_channels() -> None:
    for token in (STRUCTURE.channel, STRUCTURE.call):
        bound_text = guide(text=GRAMMARS.lark(f'start: <[{token}]> "a" | "b"'))
        assert {TOKENIZER.spell([token]) for token in choices(bound_text)} == {"b"}


def test_a_value_may_be_spelt_like_the_grammars_own_words() -> None:
    """QUOTE once stood for the token of quotes in these grammars, whoever had written it."""
    words = {"type": "object", "properties": {"QUOTE": {"enum": ["QUOTE"]}}, "required": ["QUOTE"]}
    made = bound({**words, "additionalProperties": False})
    tokens = TOKENIZER.encode('<|tool_call>call:f{QUOTE:<|"|>QUOTE<|"|>}<tool_call|>')
    matcher = made.start()
    for token in tokens:
        assert matcher.allowed()[token]
        matcher.take(token)
    assert matcher.ended


def test_patterns_are_searched_for_as_json_schema_says() -> None:
    for pattern, text in (("b", "abc"), ("^a", "abc"), ("c$", "abc"), ("^a/b$", "a/b")):
        schema = {"properties": {"p": {"type": "string", "pattern": pattern}}, "required": ["p"]}
        assert re.search(pattern, text)
        matcher = bound(schema).start()
        for token in TOKENIZER.encode(f'<|tool_call>call:f{{p:<|"|>{text}<|"|>}}<tool_call|>'):
            matcher.take(token)
        assert matcher.ended
