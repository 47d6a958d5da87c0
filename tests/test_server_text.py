"""`/v1/completions` with echo and scores, `/tokenize` and `/detokenize`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from openai import OpenAI
from serving import DEMO, HTTP, refused, say, valid

from cabochon.llm import LLM

PROMPT = "<bos><|turn>user\nWho are you?<turn|>\n<|turn>model\n"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", kv_cache_bytes=64 * 2**20, prefill_chunk=16) as llm:
        yield llm


def complete(client: OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    return client.completions.create(
        model=DEMO, prompt=prompt, **{"temperature": 0, "max_tokens": 20, **fields}
    )


def test_a_prompt_is_continued_as_it_stands(client: OpenAI, llm: LLM) -> None:
    answer = complete(client)
    expected = llm.chat(say("Who are you?"), llm.defaults.__class__(temperature=0, max_tokens=20))
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "stop"
    valid("CreateCompletionResponse", answer.model_dump(exclude_unset=True))
    ids = llm.prompts.tokenizer.encode(PROMPT)
    assert complete(client, ids).choices[0].text == expected.text
    assert answer.usage.prompt_tokens == len(ids)
    without = PROMPT.removeprefix("<bos>")
    assert complete(client, without).choices[0].text == expected.text


def test_a_stream_adds_up(url: str) -> None:
    # Not strict: the client's type of a chunk has no null for its end, which OpenAI sends.
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    fields = {"logprobs": 2, "echo": True}
    whole = complete(client, **fields).choices[0]
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}, **fields))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.text for choice in choices) == whole.text
    for name in ("tokens", "token_logprobs", "text_offset"):
        streamed = [item for choice in choices for item in getattr(choice.logprobs, name)]
        expected = getattr(whole.logprobs, name)
        if name == "token_logprobs":
            assert streamed[1:] == pytest.approx(expected[1:], abs=1e-5)
        elif name == "tokens":
            assert streamed == expected
    assert whole.text.startswith(PROMPT)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("most", [0, 1])
def test_a_prompt_is_scored(client: OpenAI, llm: LLM, as_ids: bool, most: int) -> None:
    """The probabilities that the model itself gives, over several chunks of a prompt."""
    text = "The quick brown fox jumps over the lazy dog. " * 3
    ids = [2, *llm.prompts.tokenizer.encode(text)]
    assert len(ids) > 3 * llm.prefill_chunk
    answer = complete(client, ids if as_ids else text, echo=True, logprobs=2, max_tokens=most)
    choice = answer.choices[0]
    expected = torch.log_softmax(llm.logits(ids), -1)
    scores = [expected[i, token].item() for i, token in enumerate(ids[1:])]
    told = choice.logprobs.token_logprobs
    if as_ids:
        assert told[0] == 0.0
        told = told[1:]
    assert told[: len(scores)] == pytest.approx(scores, abs=2e-3)
    assert len(told) == len(scores) + most
    best = [row.max().item() for row in expected[: len(scores)]]
    tops = choice.logprobs.top_logprobs[1 if as_ids else 0 :]
    assert [max(top.values()) for top in tops][: len(best)] == pytest.approx(best, abs=2e-3)
    assert answer.usage.completion_tokens == most
    if not as_ids and not most:
        assert choice.text == text
        assert "".join(choice.logprobs.tokens) == text


def test_many_prompts_and_choices(client: OpenAI, llm: LLM) -> None:
    one = complete(client, "Hello").choices[0].text
    other = complete(client, "red, blue,").choices[0].text
    answer = complete(client, ["Hello", "red, blue,"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [one, one, other, other]
    rows = [[2, *llm.prompts.tokenizer.encode("Hello")]] * 2
    assert [choice.text for choice in complete(client, rows).choices] == [one, one]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"echo": "yes"}, "echo"),
        ({"tools": []}, "tools"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_refusals(url: str, fields: dict[str, Any], param: str) -> None:
    body = {"model": DEMO, "prompt": "Hello", **fields}
    refused(HTTP.post(f"{url}/v1/completions", json=body), 400, param)


def test_text_becomes_tokens_and_text_again(url: str, llm: LLM) -> None:
    def ask(path: str, body: Any) -> Any:
        response = HTTP.post(f"{url}{path}", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    text = "Hi <|turn> 🐈"
    made = ask("/tokenize", {"prompt": text, "return_token_strs": True})
    assert made["tokens"] == llm.prompts.tokenizer.encode("<bos>" + text)
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert made["max_model_len"] == llm.max_context
    assert ask("/detokenize", {"tokens": made["tokens"]}) == {"prompt": "<bos>" + text}
    plain = ask("/tokenize", {"prompt": text, "add_special_tokens": False})
    assert plain["tokens"] == made["tokens"][1:]
    chat = ask("/tokenize", {"model": DEMO, "messages": say(text)})
    assert chat["tokens"] == list(llm.prompts.chat(say(text)).tokens)
    refused(HTTP.post(f"{url}/detokenize", json={"tokens": [10**6]}), 400, "tokens[0]")
    refused(HTTP.post(f"{url}/tokenize", json={"text": "a"}), 400, "text")
    refused(HTTP.post(f"{url}/tokenize", json={"prompt": "a", "model": "b"}), 404, "model")


def test_probabilities_are_numbers_that_json_has(client: OpenAI) -> None:
    answer = complete(client, [2, 0, 1, 3, 2], echo=True, logprobs=20, max_tokens=2)
    logprobs = answer.choices[0].logprobs
    for top in logprobs.top_logprobs[1:]:
        assert all(math.isfinite(value) for value in top.values())


def test_cached_tokens_of_several_prompts_add_up(client: OpenAI) -> None:
    prompts = [f"{PROMPT}{word} {word} {word} and on it goes" for word in ("Up", "Down")]
    for _ in range(2):
        answer = complete(client, prompts, max_tokens=2, n=2, extra_body={"ignore_eos": True})
    alone = [complete(client, one, max_tokens=2).usage for one in prompts]
    whole = sum(usage.prompt_tokens_details.cached_tokens for usage in alone)
    assert whole > 0
    assert answer.usage.prompt_tokens_details.cached_tokens == whole
    assert answer.usage.prompt_tokens == sum(usage.prompt_tokens for usage in alone)


def test_a_text_that_no_context_holds_is_not_tokenized(url: str) -> None:
    body = {"prompt": "a b" * 3_000_000}
    refused(HTTP.post(f"{url}/tokenize", json=body), 400, None, "characters", "8,000,000")
    body = {"prompt": "1" * 2**20}  # a token each, and the first of all
    refused(HTTP.post(f"{url}/tokenize", json=body), 400, None, "tokens", "1,048,576")


def test_a_stream_with_the_scores_of_a_long_prompt(url: str) -> None:
    asked = {"model": DEMO, "prompt": PROMPT + "and so on " * 300, "echo": True, "logprobs": 20}
    asked |= {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    whole = HTTP.post(f"{url}/v1/completions", json=asked).json()["choices"][0]
    streamed = HTTP.post(f"{url}/v1/completions", json={**asked, "stream": True}).text
    events = [line.removeprefix("data: ") for line in streamed.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event)["choices"][0] for event in events]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [one for piece in pieces for one in piece["logprobs"][name]] == values
