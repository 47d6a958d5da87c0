"""The server answers as OpenAI's own client and OpenAI's own description of the API expect.

The model is the demo, the engine the real one, the HTTP server a real one on a loopback port.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from serving import (
    DEMO,
    HTTP,
    SCHEMAS,
    data_url,
    picture_bytes,
    refused,
    say,
    serving,
    show,
    strict_client,
    until,
    valid,
)

from cabochon.llm import LLM

WHAT = "What colour is this rectangle?"


def is_schema(name: str, value: Any) -> None:
    """`value` is what OpenAI's description says, and has no field beside it."""
    valid(name, value)
    assert set(value) <= set(SCHEMAS["$defs"][name]["properties"])


def ask(client: OpenAI, messages: Any, **fields: Any) -> str:
    fields = {"temperature": 0, "max_tokens": 24, **fields}
    answer = client.chat.completions.create(model=DEMO, messages=messages, **fields)
    assert answer.choices[0].message.content is not None
    return answer.choices[0].message.content


def test_models(client: OpenAI, url: str, llm: LLM) -> None:
    assert [model.id for model in client.models.list()] == [DEMO]
    assert client.models.retrieve(DEMO).id == DEMO
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    listed = httpx.get(f"{url}/v1/models").json()
    valid("ListModelsResponse", listed)
    card = httpx.get(f"{url}/v1/models/{DEMO}").json()
    assert listed["data"] == [card]
    valid("Model", card)
    assert card["context_length"] == llm.max_context
    assert card["plan_hash"] == llm.report.hash
    assert card["fingerprint"] == llm.fingerprint == llm.certificate.fingerprint
    messages: Any = [{"role": "user", "content": "Who are you?"}]
    answer = client.chat.completions.create(model=DEMO, messages=messages, max_tokens=1)
    assert llm.fingerprint in (answer.system_fingerprint or "")
    assert card["quantization"]
    assert card["capabilities"] == {
        "vision": True, "audio": False, "video": True, "tools": True, "thinking": True
    }  # fmt: skip


def test_health(url: str) -> None:
    response = httpx.get(f"{url}/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert response.headers["x-request-id"].startswith("req_")


def test_an_answer_has_openais_shape(url: str, llm: LLM) -> None:
    body = {"model": DEMO, "messages": say("Who are you?"), "temperature": 0, "max_tokens": 24}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    is_schema("CreateChatCompletionResponse", answer)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(llm.prompts.chat(body["messages"]).tokens)
    assert 0 < usage["completion_tokens"] <= 24
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"]


def test_a_stream_adds_up_to_the_answer(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=DEMO, messages=say("Who are you?"), temperature=0, max_tokens=24, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ask(client, say("Who are you?"))
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_events_have_openais_shape_and_end_with_usage(url: str) -> None:
    body = {
        "model": DEMO,
        "messages": say("Who are you?"),
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 5,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in chunks[:-1]:
        assert chunk.pop("usage") is None
    for chunk in chunks:
        is_schema("CreateChatCompletionStreamResponse", chunk)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_stream_helper_of_the_client(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=DEMO, messages=say("Who are you?"), temperature=0, max_tokens=24
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ask(client, say("Who are you?"))


@pytest.mark.parametrize("colour", ["red", "blue"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_picture_is_seen(client: OpenAI, colour: str, kind: str) -> None:
    answer = ask(client, show(picture_bytes(colour, kind=kind), WHAT))
    assert colour in answer.lower()


def test_a_picture_as_a_bare_string(client: OpenAI) -> None:
    parts = [
        {"type": "image_url", "image_url": data_url(picture_bytes("blue"))},
        {"type": "text", "text": WHAT},
    ]
    assert "blue" in ask(client, [{"role": "user", "content": parts}]).lower()


def test_several_pictures_in_their_order(client: OpenAI, llm: LLM, url: str) -> None:
    red, blue = picture_bytes("red"), picture_bytes("blue", (160, 48))
    both = show("First:", red, "Second:", blue, "What do you see?")
    body = {"model": DEMO, "messages": both, "max_tokens": 8, "temperature": 0}
    usage = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["usage"]
    alone = [
        client.chat.completions.create(model=DEMO, messages=show(p), max_tokens=1).usage
        for p in (red, blue)
    ]
    texts = client.chat.completions.create(
        model=DEMO, messages=show("First:", "Second:", "What do you see?"), max_tokens=1
    ).usage
    empty = client.chat.completions.create(model=DEMO, messages=say(""), max_tokens=1).usage
    frame = empty.prompt_tokens
    assert usage["prompt_tokens"] - frame == (
        sum(u.prompt_tokens - frame for u in alone) + texts.prompt_tokens - frame
    )
    history = [
        *show(red, WHAT),
        {"role": "assistant", "content": "Red."},
        *show(blue, WHAT),
    ]
    assert "blue" in ask(client, history).lower()


def test_roles(client: OpenAI) -> None:
    system = ask(client, [{"role": "system", "content": "Be brief."}, *say("Who are you?")])
    developer = ask(client, [{"role": "developer", "content": "Be brief."}, *say("Who are you?")])
    assert system == developer
    history = [*say("Who are you?"), {"role": "assistant", "content": ""}, *say("Who are you?")]
    assert ask(client, history)


def test_what_the_client_gives_back_is_taken(client: OpenAI) -> None:
    first = client.chat.completions.create(
        model=DEMO, messages=say("Who are you?"), temperature=0, max_tokens=24
    )
    history = [*say("Who are you?"), first.choices[0].message, *say("Who are you?")]
    assert ask(client, history)


@pytest.mark.parametrize("as_list", [False, True])
def test_stop(client: OpenAI, as_list: bool) -> None:
    full = ask(client, say("Who are you?"))
    stop = full[2:6]
    answer = client.chat.completions.create(
        model=DEMO,
        messages=say("Who are you?"),
        temperature=0,
        stop=[stop, "never said"] if as_list else stop,
    )
    assert answer.choices[0].message.content == full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(client: OpenAI, field: str) -> None:
    answer = client.chat.completions.create(
        model=DEMO, messages=say("Who are you?"), extra_body={field: 3}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_a_seed_draws_the_same_answer_again(client: OpenAI) -> None:
    fields = {"temperature": 2, "max_tokens": 40, "extra_body": {"ignore_eos": True, "top_k": 0}}
    drawn = [ask(client, say("Tell me."), seed=seed, **fields) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1  # the demo is sure of what it says


def test_extensions(client: OpenAI, llm: LLM) -> None:
    likeliest = ask(client, say("Who are you?"))
    for extra in ({"top_k": 1}, {"min_p": 1.0}):
        assert ask(client, say("Who are you?"), temperature=1, extra_body=extra) == likeliest
    first = llm.prompts.tokenizer.encode(likeliest)[0]
    stopped = ask(client, say("Who are you?"), extra_body={"stop_token_ids": [first]})
    assert stopped == ""


def test_fields_without_effect_are_taken(client: OpenAI) -> None:
    plain = ask(client, say("Who are you?"))
    assert plain == ask(
        client,
        say("Who are you?"),
        user="me",
        metadata={"run": "1"},
        store=False,
        parallel_tool_calls=True,
        service_tier="auto",
        n=1,
        logprobs=False,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
    )


def test_concurrent_requests_answer_as_alone(client: OpenAI) -> None:
    asked = [
        say("Who are you?"),
        show(picture_bytes("red"), WHAT),
        show(picture_bytes("blue"), WHAT),
        say("What is 2 + 3?"),
    ]
    alone = [ask(client, messages) for messages in asked]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda messages: ask(client, messages), asked * 3))
    assert together == alone * 3


LONG = {"ignore_eos": True, "temperature": 0}


def test_a_stream_that_is_left_is_cancelled(client: OpenAI, llm: LLM) -> None:
    stream = client.chat.completions.create(
        model=DEMO, messages=say("Who are you?"), stream=True, extra_body=LONG
    )
    for _ in range(3):
        next(stream)
    assert llm.engine.load == 1
    stream.close()
    assert until(lambda: llm.engine.load == 0)


def test_an_answer_nobody_waits_for_is_cancelled(client: OpenAI, llm: LLM) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model=DEMO, messages=say("Who are you?"), extra_body=LONG
        )
    assert until(lambda: llm.engine.load == 0)


def test_a_full_queue_says_when_to_come_back(llm: LLM) -> None:
    with serving(llm, max_batch=1, max_queue=1) as url:
        client = strict_client(url)
        streams = [
            client.chat.completions.create(
                model=DEMO, messages=say("Who are you?"), stream=True, extra_body=LONG
            )
            for _ in range(2)
        ]
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client, say("Who are you?"))
        assert int(refused.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
        assert until(lambda: llm.engine.load == 0)
        time.sleep(0.1)
        assert ask(client, say("Who are you?"))


def test_an_engine_that_ends_is_told_inside_the_stream() -> None:
    with LLM(dtype="float32", kv_cache_bytes=32 * 2**20) as llm, serving(llm) as url:
        stream = strict_client(url).chat.completions.create(
            model=DEMO, messages=say("Who are you?"), stream=True, extra_body=LONG
        )
        next(stream)
        threading.Timer(0.05, llm.engine.close).start()
        with pytest.raises(openai.APIError, match="closed") as failed:
            list(stream)
        assert failed.value.body is not None
        is_schema("Error", failed.value.body)


LONG_TEXT = "The quick brown fox jumps over the lazy dog, and again. " * 30_000
KEYS = b"{" + b",".join(b'"k%d":0' % i for i in range(2_500_000)) + b"}"
MUCH: dict[str, tuple[str, bytes, int, str | None]] = {
    "text": (
        "/v1/chat/completions",
        json.dumps({"model": DEMO, "messages": say(LONG_TEXT)}).encode(),
        400, "messages",
    ),
    "tokens of a text": ("/tokenize", json.dumps({"prompt": "1" * 3_000_000}).encode(), 400, None),
    "token ids": (
        "/v1/completions", json.dumps({"model": DEMO, "prompt": [9] * 5_000_000}).encode(),
        400, None,
    ),
    "token ids to be spelt": (
        "/detokenize", json.dumps({"tokens": [300] * 1_000_000}).encode(), 200, None
    ),
    "keys": ("/v1/chat/completions", KEYS, 400, None),
}  # fmt: skip


@pytest.mark.parametrize("much", MUCH)
def test_health_is_told_while_much_is_worked_on(url: str, much: str) -> None:
    """What lets no other thread run, as readers and writers in C do, would be heard as silence.

    Every time: where it is heard once of three times, somebody else had the processor.
    """
    assert any(heard(url, *MUCH[much]) for _ in range(3))


def heard(url: str, path: str, body: bytes, status: int, param: str | None) -> bool:
    """Whether `/health` answers at once while this request is worked on."""
    waits: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        answer = pool.submit(HTTP.post, f"{url}{path}", content=body)
        while not answer.done():
            before = time.monotonic()
            assert HTTP.get(f"{url}/health").status_code == 200
            waits.append(time.monotonic() - before)
        took = time.monotonic() - start
    if status == 200:
        assert answer.result().status_code == 200
    else:
        refused(answer.result(), status, param)
    return max(waits) < max(0.4, took / 4)
