"""Tools, schemas, grammars and histories that no chat can have: a 400 that names the place."""

from __future__ import annotations

from typing import Any

import pytest
from serving import DEMO, post, refused, say, serving

from cabochon.llm import LLM

CLOCK = {"type": "function", "function": {"name": "clock"}}
ASK = say("What will the weather be?")


def schema(value: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    return {"response_format": form}


def forced(parameters: Any) -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return {"tools": [tool], "tool_choice": "required"}


SCHEMA = "response_format.json_schema.schema"
TOOL = "tools[0].function.parameters"
REFUSED: list[tuple[dict[str, Any], str]] = [
    (schema({"type": "objec"}), SCHEMA),
    (schema({"type": "string", "not": {"const": "a"}}), SCHEMA),
    (schema({"type": "string", "pattern": "(?=a)b"}), SCHEMA),
    (schema({"$ref": "#/$defs/none"}), SCHEMA),
    (schema({"type": "string", "not": {}, "x-guidance": {"lenient": True}}), SCHEMA),
    ({"response_format": {"type": "regex", "regex": "(a"}}, "response_format.regex"),
    ({"response_format": {"type": "grammar", "grammar": "start: %%"}}, "response_format.grammar"),
    ({"response_format": {"type": "poem"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (forced({"type": "array"}), TOOL),
    (forced({"type": "object", "properties": {"a": {"not": {}}}}), f"{TOOL}.properties.a"),
    (forced({"properties": {"a": {"oneOf": [{}]}}}), f"{TOOL}.properties.a"),
    (forced({"properties": {"a": {"type": "string", "pattern": "["}}}), "tools"),
    (forced({"properties": {}, "required": ["b"]}), TOOL),
    (forced({"properties": {"a": {"$ref": "#/$defs/b"}}}), f"{TOOL}.properties.a"),
    (forced({"properties": {"a": {"$ref": []}}}), f"{TOOL}.properties.a"),
    (forced({"properties": {"a": {"type": [{}]}}}), f"{TOOL}.properties.a"),
    (forced({"properties": {"a": {}}, "required": [[]]}), TOOL),
    (forced({"$ref": "#/x", "x": 5}), TOOL),
    ({"tools": [CLOCK, CLOCK]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type"),
    (
        {"tools": [{"type": "function", "function": {"name": "two words"}}]},
        "tools[0].function.name",
    ),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "no"}}},
        "tool_choice",
    ),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a.[key]"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    (
        {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
        "reasoning_effort",
    ),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize"),
    ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ({"thinking_token_budget": -1}, "thinking_token_budget"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda v: str(v)[:60])
def test_what_cannot_be_obeyed_is_refused(url: str, fields: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        refused(post(url, {"model": DEMO, "messages": ASK, "stream": stream, **fields}), 400, param)


def test_a_grammar_of_special_tokens_is_no_text(url: str) -> None:
    form = {"type": "grammar", "grammar": "start: <|turn>"}
    body = {"model": DEMO, "messages": ASK, "response_format": form}
    refused(post(url, body), 400, "response_format.grammar", "special token")


def call(id_: str, arguments: str = "{}") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": "clock", "arguments": arguments}}


def assistant(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def result(id_: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": "12:00"}


HISTORIES: list[tuple[list[dict[str, Any]], str]] = [
    ([*ASK, result("a")], "messages[1].tool_call_id"),
    ([*ASK, assistant(call("a")), result("b")], "messages[2].tool_call_id"),
    ([*ASK, assistant(call("a")), result("a"), result("a")], "messages[3].tool_call_id"),
    ([*ASK, assistant(call("a")), *ASK], "messages[1].tool_calls"),
    ([*ASK, assistant(call("a"), call("b")), result("a")], "messages[1].tool_calls"),
    ([*ASK, assistant(call("a"), call("a"))], "messages[1].tool_calls"),
    ([*ASK, assistant(call("a", "[1]")), result("a")],
     "messages[1].tool_calls[0].function.arguments"),
    ([*ASK, assistant(call("a", '{"a": NaN}')), result("a")],
     "messages[1].tool_calls[0].function.arguments"),
    ([*ASK, assistant(call("a", "{")), result("a")],
     "messages[1].tool_calls[0].function.arguments"),
    ([{**ASK[0], "tool_calls": [call("a")]}], "messages[0].tool_calls"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "param"), HISTORIES, ids=lambda v: str(v)[:60])
def test_a_history_that_does_not_fit_together(
    url: str, messages: list[dict[str, Any]], param: str
) -> None:
    refused(post(url, {"model": DEMO, "messages": messages}), 400, param)


def test_a_template_without_tools_or_thoughts_says_so(tiny: LLM) -> None:
    with serving(tiny) as url:
        body = {"model": tiny.name, "messages": ASK}
        refused(post(url, {**body, "tools": [CLOCK]}), 400, "tools", "template")
        history = [*ASK, assistant(call("a")), result("a")]
        refused(post(url, {**body, "messages": history}), 400, "messages", "template")
        refused(post(url, {**body, "reasoning_effort": "low"}), 400, "reasoning_effort")
        assert post(url, {**body, "reasoning_effort": "none", "max_tokens": 1}).status_code == 200
