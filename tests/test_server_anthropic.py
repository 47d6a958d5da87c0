"""Anthropic's `/v1/messages` through Anthropic's own client, strict about what it reads."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import jsonschema
import pytest
from anthropic import Anthropic
from openai import OpenAI
from serving import DEMO, HTTP, picture_bytes, say, serving, strict_client

from cabochon.engine.request import Delta
from cabochon.engine.sampler import Sampling
from cabochon.llm import LLM
from cabochon.serve.anthropic import Blocks
from cabochon.text.calls import ToolCall
from cabochon.text.parser import Structure

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
}
GREEDY = {"temperature": 0}  # this client's own methods no longer have it
WEATHER = {"name": "weather", "description": "Weather.", "input_schema": PARAMETERS}


@pytest.fixture(scope="module")
def url(llm: LLM) -> Iterator[str]:
    with serving(llm, api_key="key") as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Anthropic:
    return Anthropic(
        base_url=url, api_key="key", max_retries=0, _strict_response_validation=True, timeout=60
    )


@pytest.fixture(scope="module")
def openai_client(url: str) -> OpenAI:
    return strict_client(url, "key")


def create(client: Anthropic, messages: Any = None, **fields: Any) -> Any:
    fields = {"max_tokens": 100, "extra_body": GREEDY, **fields}
    return client.messages.create(model=DEMO, messages=messages or say("Who are you?"), **fields)


def test_a_message(client: Anthropic, openai_client: OpenAI) -> None:
    answer = create(client)
    chat = openai_client.chat.completions.create(
        model=DEMO, messages=say("Who are you?"), temperature=0, max_tokens=100
    )
    assert [block.text for block in answer.content] == [chat.choices[0].message.content]
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    assert create(client, max_tokens=2).stop_reason == "max_tokens"
    stop = answer.content[0].text[3:6]
    cut = create(client, stop_sequences=[stop])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)


def test_a_stream_adds_up(client: Anthropic) -> None:
    with client.messages.stream(
        model=DEMO, messages=say("Who are you?"), max_tokens=100, extra_body=GREEDY
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.text for block in final.content] == [b.text for b in create(client).content]
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 0
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_calls_and_their_results(client: Anthropic) -> None:
    forced = {"type": "any", "disable_parallel_tool_use": True}
    first = create(client, tools=[WEATHER], tool_choice=forced)
    (called,) = first.content
    assert (called.type, called.name, first.stop_reason) == ("tool_use", "weather", "tool_use")
    jsonschema.validate(called.input, PARAMETERS)
    with client.messages.stream(
        model=DEMO, messages=say("Who are you?"), max_tokens=100, extra_body=GREEDY,
        tools=[WEATHER], tool_choice={**forced, "type": "tool", "name": "weather"},
    ) as stream:  # fmt: skip
        assert stream.get_final_message().content[0].input == called.input
    history = [
        *say("Who are you?"),
        {"role": "assistant", "content": first.content},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": called.id, "content": "sunny"},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    assert create(client, history, tools=[WEATHER]).content


def test_a_call_with_numbers_that_are_too_large() -> None:
    """They are valid JSON, but an answer with infinity, or Python's refusal, would be a 500."""
    written = '{"a": -1e999, "b": %s, "c": 1.5, "d": 12}' % ("9" * 5000)
    blocks = Blocks()
    events = blocks.add(Delta(calls=(ToolCall("f", written),), finish_reason="stop"))
    assert events[1]["delta"]["partial_json"] == written
    assert blocks.content[0]["input"] == {"a": "-1e999", "b": "9" * 5000, "c": 1.5, "d": 12}
    json.dumps(blocks.content, allow_nan=False)


def test_thoughts(client: Anthropic, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = Structure.of(llm.prompts.tokenizer)
    penalize = Sampling.penalize
    drawn: list[int] = []

    def wishful(self: Sampling, logits: Any) -> Any:
        """The demo was not taught to think: its wish to open a channel is injected."""
        logits = penalize(self, logits).copy()
        drawn.append(1)
        logits[structure.channel] += 1000.0 if len(drawn) == 1 else -1000.0
        logits[[*llm.engine.ends, structure.channel_end]] -= 1000.0
        return logits

    monkeypatch.setattr(Sampling, "penalize", wishful)
    monkeypatch.setattr(Sampling, "count", None)  # it wants all logits
    with client.messages.stream(
        model=DEMO, messages=say("Think."), max_tokens=20,
        thinking={"type": "enabled", "budget_tokens": 6},
    ) as stream:  # fmt: skip
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[0].thinking
    monkeypatch.undo()
    history = [*say("Think."), {"role": "assistant", "content": final.content}, *say("And?")]
    assert create(client, history).content


def test_system_and_pictures(client: Anthropic) -> None:
    data = base64.b64encode(picture_bytes("blue")).decode()
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    text = {"type": "text", "text": "What colour is this rectangle?"}
    answer = create(
        client,
        [{"role": "user", "content": [image, text]}],
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    )
    assert "blue" in answer.content[0].text.lower()


def test_a_schema(client: Anthropic) -> None:
    form = {"format": {"type": "json_schema", "schema": PARAMETERS}}
    answer = create(client, output_config=form)
    jsonschema.validate(json.loads(answer.content[0].text), PARAMETERS)


def test_tokens_are_counted(client: Anthropic) -> None:
    counted = client.messages.count_tokens(model=DEMO, messages=say("Who are you?"))
    usage = create(client, max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages[0].role"),
        ({"messages": [*say("a"), {"role": "assistant", "content": "b"}]}, "messages[1]"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        (
            {"tools": [{"name": "f", "input_schema": {"properties": {"a": {"not": {}}}}}],
             "tool_choice": {"type": "any"}},
            "tools[0].input_schema.properties.a",
        ),
        ({"tool_choice": {"type": "auto", "name": "f"}}, "tool_choice.name"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {
                "type": "base64", "data": "aaaa", "url": "https://example.com/a.png"}}]}]},
            "content[0].source",
        ),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"n": 2}, "n"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "b"}]}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "content[0]"),
    ],
    ids=lambda v: str(v)[:50],
)  # fmt: skip
def test_refusals(client: Anthropic, url: str, fields: dict[str, Any], words: str) -> None:
    body = {"model": DEMO, "max_tokens": 5, "messages": say("Hi"), **fields}
    response = HTTP.post(f"{url}/v1/messages", json=body, headers={"x-api-key": "key"})
    assert response.status_code == 400, response.text
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert words in response.json()["error"]["message"]


def test_errors_are_the_clients_own(client: Anthropic, url: str) -> None:
    with pytest.raises(anthropic.NotFoundError, match="claude"):
        client.messages.create(model="claude", messages=say("Hi"), max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        create(client, extra_body={"temperature": 3})
    stranger = Anthropic(base_url=url, api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError):
        create(stranger)
