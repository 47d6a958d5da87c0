"""Tools, thinking, bound answers, several choices and probabilities, through OpenAI's own client.

The demo was never taught to call tools or to think. What binds an answer works with any model: the
sampler leaves out what does not fit, and a bias opens the channel of thoughts.
"""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Any

import jsonschema
import openai
import pytest
import torch
from openai import OpenAI
from pydantic import BaseModel, Field
from serving import DEMO, HTTP, say, valid

from cabochon.llm import LLM
from cabochon.text.parser import Structure

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Zürich", 'the "Hague"']},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather.", "parameters": CITY},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASK = say("What will the weather be?")


@pytest.fixture(scope="module")
def structure(llm: LLM) -> Structure:
    return Structure.of(llm.prompts.tokenizer)


def create(client: OpenAI, messages: Any = ASK, **fields: Any) -> Any:
    fields = {"max_tokens": 120, "seed": 5, **fields}
    return client.chat.completions.create(model=DEMO, messages=messages, **fields)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", {"function": {"name": "get_weather"}}])
def test_a_forced_call_obeys_the_tools_schema(client: OpenAI, seed: int, choice: Any) -> None:
    if isinstance(choice, dict):
        choice = {"type": "function", **choice}
    answer = create(
        client, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, seed=seed
    )
    (called,) = answer.choices[0].message.tool_calls
    assert called.function.name == "get_weather"
    jsonschema.validate(json.loads(called.function.arguments), CITY)
    assert called.id.startswith("call_")
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    valid("CreateChatCompletionResponse", answer.model_dump(exclude_unset=True))


def test_a_streamed_call_adds_up_to_the_answer(client: OpenAI) -> None:
    fields = {
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 200,
        "n": 2,
    }
    whole = create(client, **fields)
    with client.chat.completions.stream(model=DEMO, messages=ASK, seed=5, **fields) as stream:
        final = stream.get_final_completion()
    assert len(whole.choices) == 2
    for a, b in zip(whole.choices, final.choices, strict=True):
        assert a.finish_reason == b.finish_reason
        assert a.message.content == (b.message.content or None)
        calls = [c.message.tool_calls or [] for c in (a, b)]
        assert [(c.function.name, c.function.arguments) for c in calls[0]] == [
            (c.function.name, c.function.arguments) for c in calls[1]
        ]
        assert calls[0]


def test_the_first_delta_of_a_call_has_its_id_and_index(client: OpenAI) -> None:
    chunks = list(
        create(client, tools=[WEATHER], tool_choice="required", stream=True, max_tokens=200)
    )
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or ()]
    assert [delta.index for delta in deltas] == list(range(len(deltas)))
    assert all(delta.id and delta.type == "function" for delta in deltas)
    assert all(isinstance(json.loads(delta.function.arguments), dict) for delta in deltas)
    for chunk in chunks:
        valid("CreateChatCompletionStreamResponse", chunk.model_dump(exclude_unset=True))


def test_the_result_of_a_call_goes_back(client: OpenAI, url: str) -> None:
    first = create(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False)
    message = first.choices[0].message
    history = [
        *ASK,
        message,
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "<turn|> sunny"},
    ]
    assert create(client, history, tools=[WEATHER]).choices[0].message is not None
    body = {
        "model": DEMO,
        "messages": [ASK[0], message.model_dump(exclude_none=True), history[2]],
        "tools": [WEATHER],
    }
    rendered = post_json(url, "/v1/chat/completions/render", body)
    assert rendered["prompt"].endswith(
        'response:get_weather{value:<|"|><turn|> sunny<|"|>}<tool_response|>'
    )
    assert "<|tool_call>call:get_weather{city:" in rendered["prompt"]
    assert rendered["count"] == len(rendered["tokens"])


def post_json(url: str, path: str, body: Any) -> Any:
    response = HTTP.post(f"{url}{path}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_no_call_is_made_where_none_may_be(client: OpenAI, structure: Structure) -> None:
    bias = {str(structure.call): 100}
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        answer = create(client, logit_bias=bias, max_tokens=30, **fields).choices[0]
        assert answer.message.tool_calls is None
        assert answer.message.content


def test_a_call_that_the_model_begins_is_well_formed(client: OpenAI, structure: Structure) -> None:
    """With the choice left to the model; a bias stands for its wish to call."""
    for seed in range(3):
        answer = create(
            client, tools=[WEATHER, CLOCK], logit_bias={str(structure.call): 60}, seed=seed,
            parallel_tool_calls=False, max_tokens=400, top_p=0.5,
        ).choices[0]  # fmt: skip
        if answer.finish_reason == "length":
            assert "<|tool_call>call:" in answer.message.content  # cut short: text, and it shows
            continue
        (called,) = answer.message.tool_calls
        assert called.function.name in ("get_weather", "clock")
        assert isinstance(json.loads(called.function.arguments), dict)


def test_a_call_cut_short_is_text(client: OpenAI) -> None:
    choice = create(client, tools=[WEATHER], tool_choice="required", max_tokens=4).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith("<|tool_call>call")


def think(structure: Structure, **fields: Any) -> dict[str, Any]:
    """Fields that make the demo think: it was not taught to, so a bias opens the channel."""
    bias = {str(structure.channel): 100, str(structure.channel_end): -100}
    extra = {"chat_template_kwargs": {"enable_thinking": True}, "thinking_token_budget": 12}
    return {"logit_bias": bias, "extra_body": {**extra, **fields}}


def test_thoughts_are_told_apart_and_bounded(client: OpenAI, structure: Structure) -> None:
    # The budget closes the channel against the bias, which would keep it open.
    fields = think(structure)
    whole = create(client, max_tokens=40, **fields)
    message = whole.choices[0].message
    assert message.reasoning_content
    assert 0 < whole.usage.completion_tokens_details.reasoning_tokens <= 14
    chunks = list(create(client, max_tokens=40, stream=True, **fields))
    reasoning = "".join(
        getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks
    )
    content = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert (reasoning, content) == (message.reasoning_content, message.content or "")


def test_a_bound_answer_may_be_thought_about_first(client: OpenAI, structure: Structure) -> None:
    """The grammar starts where the channel closes, and holds from there on."""
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    fields = think(structure)
    for streaming in (False, True):
        answer = create(client, response_format=form, max_tokens=150, stream=streaming, **fields)
        if streaming:
            deltas = [c.choices[0].delta for c in answer]
            content = "".join(d.content or "" for d in deltas)
            reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
        else:
            content = answer.choices[0].message.content
            reasoning = answer.choices[0].message.reasoning_content
            assert answer.choices[0].finish_reason == "stop"
        assert reasoning
        jsonschema.validate(json.loads(content), CITY)


def test_without_thinking_a_bound_answer_opens_no_channel(
    client: OpenAI, structure: Structure
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    answer = create(client, response_format=form, logit_bias={str(structure.channel): 100})
    jsonschema.validate(json.loads(answer.choices[0].message.content), CITY)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Shape(BaseModel):
    colour: Colour
    corners: int = Field(ge=0, le=9)
    label: str | None


def test_the_client_parses_what_it_asked_for(client: OpenAI) -> None:
    for seed in range(3):
        parsed = client.chat.completions.parse(
            model=DEMO, messages=ASK, response_format=Shape, seed=seed, max_tokens=300, top_p=0.4
        )
        assert isinstance(parsed.choices[0].message.parsed, Shape)


def test_the_client_parses_arguments(client: OpenAI) -> None:
    tool = openai.pydantic_function_tool(Shape)
    parsed = client.chat.completions.parse(
        model=DEMO, messages=ASK, tools=[tool], tool_choice="required", max_tokens=300, top_p=0.4,
        parallel_tool_calls=False, seed=3,
    )  # fmt: skip
    (called,) = parsed.choices[0].message.tool_calls
    assert isinstance(called.function.parsed_arguments, Shape)
    message = parsed.choices[0].message.model_dump(mode="json")  # with all that the client added
    history = [*ASK, message, {"role": "tool", "tool_call_id": called.id, "content": "ok"}]
    assert create(client, history, tools=[tool], max_tokens=2).choices


def test_json_objects_regular_expressions_and_grammars(client: OpenAI) -> None:
    answers = {}
    for form in (
        {"type": "json_object"},
        {"type": "regex", "regex": "(red|blue) [0-9]{3}"},
        {"type": "grammar", "grammar": 'start: "a" ("b" | "c"){2,4} "!"'},
        {"type": "text"},
    ):
        answer = create(client, response_format=form, max_tokens=300, top_p=0.3)
        answers[form["type"]] = answer.choices[0].message.content
    assert isinstance(json.loads(answers["json_object"]), dict)
    assert re.fullmatch("(red|blue) [0-9]{3}", answers["regex"])
    assert re.fullmatch("a[bc]{2,4}!", answers["grammar"])


def test_logprobs_are_the_models_own(client: OpenAI, llm: LLM) -> None:
    answer = create(client, say("Who are you?"), logprobs=True, top_logprobs=4, temperature=0)
    told = answer.choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in told).decode() == answer.choices[0].message.content
    prompt = llm.prompts.chat(say("Who are you?")).tokens
    tokens = [*prompt, *llm.prompts.tokenizer.encode(answer.choices[0].message.content)]
    expected = torch.log_softmax(llm.logits(tokens), -1)
    for i, one in enumerate(told):
        row = expected[len(prompt) - 1 + i]
        assert one.logprob == pytest.approx(row.max().item(), abs=1e-3)
        assert one.top_logprobs[0].token == one.token
        assert [t.logprob for t in one.top_logprobs] == pytest.approx(
            row.topk(4).values.tolist(), abs=1e-3
        )
    chunks = create(client, say("Who are you?"), logprobs=True, top_logprobs=4, temperature=0,
                    stream=True)  # fmt: skip
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert [t.token for t in streamed] == [t.token for t in told]


def test_several_choices(client: OpenAI) -> None:
    fields = {"temperature": 2, "max_tokens": 40, "extra_body": {"top_k": 0, "ignore_eos": True}}
    one = create(client, say("Tell me."), n=3, seed=1, **fields)
    again = create(client, say("Tell me."), n=3, seed=1, **fields)
    texts = [choice.message.content for choice in one.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    assert len(set(texts)) > 1  # the demo is sure of what it says
    assert texts == [choice.message.content for choice in again.choices]
    assert one.usage.completion_tokens == 120
    chunks = list(create(client, say("Tell me."), n=3, seed=1, stream=True, **fields))
    streamed = ["", "", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert sum(chunk.choices[0].finish_reason == "length" for chunk in chunks) == 3


def test_a_bias_bans_and_forces(client: OpenAI, llm: LLM) -> None:
    tokens = llm.prompts.tokenizer.encode("red")
    answer = create(client, logit_bias={str(tokens[0]): 100}, max_tokens=3, temperature=0)
    assert answer.choices[0].message.content.startswith("red"[:1])
    plain = create(client, say("Who are you?"), temperature=0).choices[0].message.content
    first = llm.prompts.tokenizer.encode(plain)[0]
    other = create(client, say("Who are you?"), temperature=0, logit_bias={str(first): -100})
    assert other.choices[0].message.content != plain
