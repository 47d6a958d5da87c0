"""Every kind of answer, whole and streamed, against OpenAI's own description of its API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import DEMO, HTTP, picture_bytes, say, show, valid

from cabochon.llm import LLM
from cabochon.text.parser import Structure

PAINT = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL = {"name": "paint", "parameters": PAINT, "strict": True}
HISTORY = [
    *say("Paint it."),
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "paint", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "It is painted."},
]
THINK = {"reasoning_effort": "high", "thinking_token_budget": 8}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a picture": {"messages": show(picture_bytes("red"), "What colour is it?")},
    "cut short": {"max_tokens": 1},
    "choices": {"n": 3, "seed": 1},
    "probabilities": {"logprobs": True, "top_logprobs": 20},
    "calls": {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
    "a result": {"messages": HISTORY, "tools": [{"type": "function", "function": TOOL}]},
    "thoughts": THINK,
    "a schema": {
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "p", "schema": PAINT, "strict": True}
        }
    },
    "a schema behind thoughts": {
        **THINK,
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PAINT}},
    },
}  # fmt: skip


def events(text: str) -> list[Any]:
    lines = [line for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def asked(url: str, path: str, body: dict[str, Any]) -> str:
    response = HTTP.post(f"{url}{path}", json={"model": DEMO, **body})
    assert response.status_code == 200, response.text
    return response.text


@pytest.mark.parametrize("name", CHATS)
def test_chats(url: str, llm: LLM, name: str) -> None:
    structure = Structure.of(llm.prompts.tokenizer)
    bias = {"logit_bias": {str(structure.channel): 100}} if "thoughts" in name else {}
    body = {
        "messages": say("Who are you?"),
        "max_tokens": 120,
        "temperature": 0,
        **bias,
        **CHATS[name],
    }
    whole = json.loads(asked(url, "/v1/chat/completions", body))
    valid("CreateChatCompletionResponse", whole)
    more = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(asked(url, "/v1/chat/completions", {**body, **more}))
    for chunk in chunks:
        valid("CreateChatCompletionStreamResponse", chunk)
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        deltas = [
            one["delta"]
            for chunk in chunks
            for one in chunk["choices"]
            if one["index"] == choice["index"]
        ]
        for field in ("content", "reasoning_content"):
            told = "".join(delta.get(field) or "" for delta in deltas)
            assert told == (choice["message"].get(field) or "")
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
        assert calls == [one["function"] for one in choice["message"].get("tool_calls") or ()]
    message = whole["choices"][0]["message"]
    assert bool(message.get("reasoning_content")) == ("thoughts" in name)
    assert bool(message.get("tool_calls")) == (name == "calls")


RESPONSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cut short": {"max_output_tokens": 1},
    "calls": {
        "tools": [{"type": "function", **TOOL}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    },
    "thoughts": {"reasoning": {"effort": "minimal"}},
    "a schema": {
        "text": {"format": {"type": "json_schema", "name": "p", "schema": PAINT, "strict": True}}
    },
    "instructions": {"instructions": "Be brief.", "metadata": {"a": "b"}, "top_p": 0.9},
}


@pytest.mark.parametrize("name", RESPONSES)
def test_responses(url: str, name: str) -> None:
    body = {"input": "Who are you?", "max_output_tokens": 120, "temperature": 0, **RESPONSES[name]}
    whole = json.loads(asked(url, "/v1/responses", body))
    valid("Response", whole)
    told = events(asked(url, "/v1/responses", {**body, "stream": True}))
    for event in told:
        valid("ResponseStreamEvent", event)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    last = told[-1]["response"]
    valid("Response", last)
    assert (
        last["status"] == whole["status"] == ("incomplete" if name == "cut short" else "completed")
    )
    kinds = [item["type"] for item in last["output"]]
    assert kinds == [item["type"] for item in whole["output"]]
    assert ("function_call" in kinds) == (name == "calls")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"echo": True, "logprobs": 5, "max_tokens": 0},
        {"prompt": ["Hello", "Good"], "n": 2, "logprobs": 2, "seed": 1},
        {"prompt": [2, 300, 301], "stop": ["a"]},
    ],
    ids=str,
)
def test_completions(url: str, fields: dict[str, Any]) -> None:
    body = {"prompt": "Hello", "max_tokens": 8, "temperature": 0, **fields}
    whole = json.loads(asked(url, "/v1/completions", body))
    valid("CreateCompletionResponse", whole)
    chunks = events(asked(url, "/v1/completions", {**body, "stream": True}))
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]


def test_models(url: str) -> None:
    valid("ListModelsResponse", HTTP.get(f"{url}/v1/models").json())
    valid("Model", HTTP.get(f"{url}/v1/models/{DEMO}").json())
