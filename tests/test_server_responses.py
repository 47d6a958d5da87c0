"""`/v1/responses` through OpenAI's own client and by OpenAI's own description."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from openai import OpenAI
from pydantic import BaseModel
from serving import (
    DEMO,
    HTTP,
    data_url,
    picture_bytes,
    refused,
    say,
    serving,
    valid,
)

from cabochon.engine.sampler import Sampling
from cabochon.llm import LLM
from cabochon.text.parser import Structure

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}


def create(client: OpenAI, input_: Any = "Who are you?", **fields: Any) -> Any:
    fields = {"temperature": 0, "max_output_tokens": 100, **fields}
    return client.responses.create(model=DEMO, input=input_, **fields)


def test_a_response(client: OpenAI, url: str, llm: LLM) -> None:
    answer = create(client)
    chat = client.chat.completions.create(
        model=DEMO, messages=say("Who are you?"), temperature=0, max_tokens=100
    )
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == "completed"
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    body = {"model": DEMO, "input": "Who are you?", "max_output_tokens": 2, "metadata": {"a": "b"}}
    raw = HTTP.post(f"{url}/v1/responses", json=body).json()
    valid("Response", raw)
    assert raw["status"] == "incomplete"
    assert raw["incomplete_details"] == {"reason": "max_output_tokens"}
    assert raw["metadata"] == {"a": "b"}


def events_of(url: str, body: Any) -> list[dict[str, Any]]:
    text = HTTP.post(f"{url}/v1/responses", json={"model": DEMO, "stream": True, **body}).text
    events = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_events_have_openais_shape_and_add_up(url: str, client: OpenAI) -> None:
    events = events_of(url, {"input": "Who are you?", "temperature": 0})
    for event in events:
        valid("ResponseStreamEvent", event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    final = events[-1]
    assert final["type"] == "response.completed"
    assert final["response"]["output"][0]["content"][0]["text"] == text
    assert text == create(client).output_text
    with client.responses.stream(model=DEMO, input="Who are you?", temperature=0) as stream:
        assert stream.get_final_response().output_text == text


def test_calls_and_their_results(client: OpenAI, url: str) -> None:
    first = create(
        client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, top_p=0.5
    )
    (called,) = first.output
    assert called.type == "function_call"
    jsonschema.validate(json.loads(called.arguments), PARAMETERS)
    history = [
        *say("Weather?"),
        called.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": called.call_id, "output": "sunny"},
    ]
    assert create(client, history, tools=[WEATHER]).output
    body = {"input": "Weather?", "tools": [WEATHER], "tool_choice": {"type": "function",
            "name": "weather"}, "parallel_tool_calls": False, "max_output_tokens": 100}  # fmt: skip
    events = events_of(url, body)
    for event in events:
        valid("ResponseStreamEvent", event)
    done = next(e for e in events if e["type"] == "response.function_call_arguments.done")
    jsonschema.validate(json.loads(done["arguments"]), PARAMETERS)


def test_reasoning_is_an_item_of_its_own(
    url: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = Structure.of(llm.prompts.tokenizer)
    penalize = Sampling.penalize
    drawn: list[int] = []

    def wishful(self: Sampling, logits: Any) -> Any:
        """The demo was not taught to think: its wish to open and close a channel is injected."""
        logits = penalize(self, logits).copy()
        drawn.append(1)
        logits[structure.channel] += 1000.0 if len(drawn) == 1 else -1000.0
        logits[structure.channel_end] += 1000.0 if len(drawn) == 8 else -1000.0
        logits[list(llm.engine.ends)] -= 1000.0
        return logits

    monkeypatch.setattr(Sampling, "penalize", wishful)
    monkeypatch.setattr(Sampling, "count", None)  # it wants all logits
    body = {"input": "Think.", "reasoning": {"effort": "low"}, "max_output_tokens": 30}
    events = events_of(url, body)
    for event in events:
        valid("ResponseStreamEvent", event)
    response = events[-1]["response"]
    assert response["output"][0]["type"] == "reasoning"
    told = "".join(e["delta"] for e in events if e["type"] == "response.reasoning_text.delta")
    assert response["output"][0]["content"][0]["text"] == told != ""
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 7


class Shape(BaseModel):
    corners: int
    red: bool


def test_the_client_parses_what_it_asked_for(client: OpenAI) -> None:
    parsed = client.responses.parse(
        model=DEMO, input="A shape!", text_format=Shape, top_p=0.4, max_output_tokens=200
    )
    assert isinstance(parsed.output_parsed, Shape)


def test_instructions_pictures_and_history(client: OpenAI) -> None:
    image = {"type": "input_image", "image_url": data_url(picture_bytes("red")), "detail": "auto"}
    text = {"type": "input_text", "text": "What colour is this rectangle?"}
    answer = create(client, [{"role": "user", "content": [image, text]}], instructions="Be brief.")
    assert "red" in answer.output_text.lower()
    again = create(client, [*say("Who are you?"), *answer.output, *say("And now?")])
    assert again.output_text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]},
            "input",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "x"}}}},
         "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
    ids=lambda v: str(v)[:50],
)  # fmt: skip
def test_refusals(url: str, fields: dict[str, Any], param: str) -> None:
    body = {"model": DEMO, "input": "Hi", **fields}
    refused(HTTP.post(f"{url}/v1/responses", json=body), 400, param)


def test_an_engine_that_ends_is_told_in_the_stream() -> None:
    with LLM(dtype="float32", kv_cache_bytes=32 * 2**20) as llm, serving(llm) as url:
        fail: Any = RuntimeError("injected")
        llm.runner.run = lambda *_, **__: (_ for _ in ()).throw(fail)  # type: ignore[method-assign]
        events = events_of(url, {"input": "Hi"})
        assert events[-1]["type"] == "response.failed"
        valid("ResponseStreamEvent", events[-1])
