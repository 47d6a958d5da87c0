"""What goes wrong behind the server's back, and what its clients notice of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from serving import DEMO, HTTP, answers, post, refused, say, serving, until

from cabochon.engine.prediction import Prediction
from cabochon.engine.scheduler import Scheduled
from cabochon.llm import LLM

QUESTIONS = ("Who are you?", "What is 3 plus 4?", "Tell me.", "What colour is it?", "Hello", "Why?")
UNLUCKY = "What is 5 plus 1?"


def body(question: str, length: int = 24, **fields: Any) -> dict[str, Any]:
    fixed = {"temperature": 0, "ignore_eos": True, "max_tokens": length}
    return {"model": DEMO, "messages": say(question), **fixed, **fields}


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def idle(llm: LLM) -> bool:
    engine = llm.engine
    return engine.load == 0 and engine.cache.free_pages() == engine.cache.plan.pages


def poison(llm: LLM, monkeypatch: pytest.MonkeyPatch, how: str) -> threading.Event:
    """From its tenth token on, the unlucky question fails; the event says that it met others."""
    tokens = llm.prompts.chat(say(UNLUCKY)).tokens
    run, predict, together = llm.runner.run, llm.runner.predict, threading.Event()
    mark = {"nan": torch.nan, "no memory for logits": 12345.0}

    def struck(scheduled: Scheduled) -> bool:
        own = tuple(scheduled.sequence.tokens)
        return own[: len(tokens)] == tokens and len(own) > len(tokens) + 10

    def poisoned(cache: Any, step: Sequence[Scheduled], **options: Any) -> torch.Tensor:
        if any(map(struck, step)):
            if len(step) > 1:
                together.set()
            if how == "raise":
                raise RuntimeError("secret")
        logits = run(cache, step, **options)
        row = 0
        with torch.inference_mode():
            for scheduled in step:
                if struck(scheduled):
                    logits[row : row + scheduled.rows] = mark[how]
                row += scheduled.rows
        return logits

    def short_of_memory(hidden: torch.Tensor, few: Sequence[bool]) -> list[Prediction]:
        if (hidden == mark["no memory for logits"]).all(dim=1).any():
            raise MemoryError("secret")
        return predict(hidden, few)

    monkeypatch.setattr(llm.runner, "predict", short_of_memory)
    monkeypatch.setattr(llm.runner, "run", poisoned)
    return together


@pytest.mark.parametrize("how", ["raise", "nan", "no memory for logits"])
def test_one_request_of_a_batch_fails(
    url: str, llm: LLM, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Told as an error where nothing was answered yet, inside the stream otherwise."""
    expected = {q: text(post(url, body(q))) for q in QUESTIONS}
    together = poison(llm, monkeypatch, how)
    with ThreadPoolExecutor(8) as pool:
        whole = pool.submit(post, url, body(UNLUCKY, 400))
        streamed = pool.submit(post, url, body(UNLUCKY, 400, stream=True))
        got = dict(
            zip(QUESTIONS, pool.map(lambda q: text(post(url, body(q))), QUESTIONS), strict=True)
        )
    assert together.is_set()
    assert got == expected
    words, code = {
        "raise": ("its log says", "internal_error"),
        "nan": ("not finite", "numerical_error"),
        "no memory for logits": ("its log says", "internal_error"),
    }[how]
    words = words.replace("its log", "the server's log")
    refused(whole.result(), 500, None, words)
    *_, last = [line for line in streamed.result().text.split("\n\n") if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert words in error["message"]
    assert error["code"] == whole.result().json()["error"]["code"] == code
    assert "secret" not in streamed.result().text + whole.result().text
    assert until(lambda: idle(llm))
    answers(url)


@pytest.mark.parametrize("layer", [0, 3])
def test_numbers_that_are_none_are_traced_to_where_they_begin(layer: int) -> None:
    """In the first layer of all, and behind layers that are sound."""
    options: dict[str, Any] = {"dtype": "float32", "kv_cache_bytes": 16 * 2**20}
    with LLM(**options, debug_nan=True) as llm, serving(llm) as url:
        expected = text(post(url, body("Tell me.")))
        norm = f"model.language_model.layers.{layer}.pre_feedforward_layernorm"
        weight = llm.runner.model.get_submodule(norm).weight
        with torch.inference_mode():
            sound = weight[5].clone()
            weight[5] = torch.inf
        refused(post(url, body("Tell me.")), 500, None, "not finite", f"the output of {norm} is")
        with torch.inference_mode():
            weight[5] = sound
        assert text(post(url, body("Tell me."))) == expected  # of the bad pages nothing is left
        assert until(lambda: idle(llm))


class Panic(BaseException):
    """As a library's Rust code raises: no Exception."""


def test_when_the_engine_stops_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*_: object) -> None:
        raise Panic

    with (
        LLM(dtype="float32", kv_cache_bytes=16 * 2**20) as llm,
        serving(llm) as url,
        ThreadPoolExecutor(4) as pool,
    ):
        waiting = [pool.submit(post, url, body("Tell me.", 400)) for _ in range(3)]
        assert until(lambda: llm.engine.load == 3)
        monkeypatch.setattr(llm.engine, "_step", panic)
        for one in waiting:
            refused(one.result(), 500, None)
        assert until(lambda: HTTP.get(f"{url}/health").status_code == 503)
        refused(post(url, body("Tell me.")), 500, None)


def test_out_of_pages_answers_are_put_off_and_stay_the_same(
    llm: LLM, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for about two of six long answers; in float32 nobody can tell."""
    length = 150
    expected = {q: text(post(url, body(q, length))) for q in QUESTIONS}
    with (
        LLM(dtype="float32", kv_cache_bytes=1_500_000, max_batch=6, prefill_chunk=64) as cramped,
        serving(cramped) as narrow,
        ThreadPoolExecutor(6) as pool,
    ):
        run, all_there = cramped.runner.run, threading.Event()
        held = lambda *step, **options: all_there.wait() and run(*step, **options)  # noqa: E731
        monkeypatch.setattr(cramped.runner, "run", held)
        asked = {q: pool.submit(post, narrow, body(q, length)) for q in QUESTIONS}
        assert until(lambda: cramped.engine.load == len(QUESTIONS), 30)
        all_there.set()
        got = {q: text(answer.result()) for q, answer in asked.items()}
        counted = HTTP.get(f"{narrow}/metrics").text
        assert until(lambda: idle(cramped))
        preemptions = cramped.engine.scheduler.preemptions
    assert preemptions > 0
    assert f'vllm:num_preemptions_total{{engine="0",model_name="{DEMO}"}} {preemptions}' in counted
    assert got == expected


def test_an_engine_that_is_gone_is_told_by_health() -> None:
    with LLM(dtype="float32", kv_cache_bytes=32 * 2**20) as llm, serving(llm) as url:
        answers(url)
        llm.engine.close()
        health = HTTP.get(f"{url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "the engine has stopped")
        refused(post(url, body("Hello")), 500, None, "closed")
