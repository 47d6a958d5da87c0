"""A server as its operator sees it: logs, metrics, its end, and faults of its host."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
from command import ENVIRONMENT, cabochon, served
from prometheus_client.parser import text_string_to_metric_families
from serving import DEMO, HTTP, post, refused, say, serving, until

from cabochon.llm import LLM
from cabochon.serve.server import Server, bind, serve
from cabochon.settings import Settings, load_settings

SECRET = "xylophone"
LONG = {"model": DEMO, "messages": say(SECRET), "stream": True, "ignore_eos": True}


def metrics(url: str) -> dict[str, float]:
    """Samples by name, with those of their labels that differ between samples."""
    text = HTTP.get(f"{url}/metrics").text
    return {
        " ".join([sample.name, *(v for k, v in sample.labels.items() if k in KEPT)]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


CHAT = "/v1/chat/completions"
KEPT = ("finished_reason", "handler", "status", "le", "plan_hash")


def test_metrics_have_the_names_that_dashboards_use(llm: LLM) -> None:
    with serving(llm) as url:
        before = metrics(url)
        body = {"model": DEMO, "messages": say("Who are you?"), "max_tokens": 5, "ignore_eos": True}
        usage = [post(url, body).json()["usage"] for _ in range(2)]
        refused(post(url, {**body, "model": "gpt-4o"}), 404, "model")
        after = metrics(url)

        def grown(name: str) -> float:
            return after[name] - before.get(name, 0.0)

        assert grown("vllm:prompt_tokens_total") == sum(u["prompt_tokens"] for u in usage)
        assert grown("vllm:generation_tokens_total") == 10
        assert grown("vllm:request_success_total length") == 2
        for name, count in {
            "vllm:time_to_first_token_seconds": 2,
            "vllm:inter_token_latency_seconds": 8,
            "vllm:e2e_request_latency_seconds": 2,
            "vllm:request_queue_time_seconds": 2,
            "vllm:request_prefill_time_seconds": 2,
            "vllm:request_decode_time_seconds": 2,
            "vllm:request_prompt_tokens": 2,
            "vllm:request_generation_tokens": 2,
        }.items():
            assert grown(f"{name}_count") == grown(f"{name}_bucket +Inf") == count, name
        assert grown("vllm:e2e_request_latency_seconds_sum") > 0
        assert grown(f"http_requests_total {CHAT} 200") == 2
        assert grown(f"http_requests_total {CHAT} 404") == 1
        assert after["vllm:num_preemptions_total"] == 0
        assert [name for name in after if name.startswith("cabochon:build_info ")]
        assert until(lambda: metrics(url)["cabochon:event_loop_lag_seconds_count"] > 0)


def test_methods_that_clients_make_up_are_one_metric(llm: LLM) -> None:
    with serving(llm) as url:
        for i in range(5):
            refused(HTTP.request(f"WORD{i}", f"{url}/health"), 405, None)
        text = HTTP.get(f"{url}/metrics").text
        assert 'method="other"' in text
        assert "WORD" not in text


def test_metrics_of_the_moment(llm: LLM) -> None:
    with (
        serving(llm) as url,
        HTTP.stream("POST", f"{url}/v1/chat/completions", json=LONG) as stream,
    ):
        assert until(lambda: llm.engine.running == 1)
        now = metrics(url)
        assert (now["vllm:num_requests_running"], now["vllm:num_requests_waiting"]) == (1, 0)
        assert 0 < now["vllm:kv_cache_usage_perc"] < 1
        stream.close()
        assert until(lambda: metrics(url)["vllm:num_requests_running"] == 0)
        assert metrics(url)["vllm:kv_cache_usage_perc"] == 0


def test_an_answer_that_takes_too_long(llm: LLM) -> None:
    with serving(llm, request_seconds=0.5) as url:
        refused(post(url, {**LONG, "stream": False}), 504, None, "0.5 seconds")
        events = [line for line in post(url, LONG).text.split("\n\n") if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


def test_a_log_has_a_line_for_each_request_and_no_words_of_it() -> None:
    with served("--log-format", "json", "--log-level", "debug") as server:
        headers = {"x-request-id": "mine-1"}
        answer = post(server.url, {**LONG, "max_tokens": 3, "stream": False}, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        forged = post(server.url, {**LONG, "max_tokens": 1}, headers={"x-request-id": 'a" b'})
        assert forged.headers["x-request-id"].startswith("req_")
        refused(post(server.url, {**LONG, "temprature": SECRET}), 400, "temprature")
        HTTP.get(f"{server.url}/nowhere%0Aat-all?{SECRET}")
        server.process.send_signal(signal.SIGTERM)
        assert server.ended(15) == 0
    assert SECRET not in "".join(server.log)
    entries = [json.loads(line) for line in server.log]
    lines: list[dict[str, Any]] = [e for e in entries if e["logger"] == "cabochon.access"]
    assert [(e["method"], e["path"], e["status"]) for e in lines] == [
        ("POST", "/v1/chat/completions", 200),
        ("POST", "/v1/chat/completions", 200),
        ("POST", "/v1/chat/completions", 400),
        ("GET", "/nowhere%0Aat-all", 404),
    ]
    assert lines[0]["request_id"] == "mine-1"
    assert all(e["seconds"] >= 0 for e in lines)
    assert lines[0]["completion_tokens"] == 3
    assert lines[0]["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert lines[0]["finish_reason"] == "length"


def test_the_first_signal_drains_and_the_second_ends() -> None:
    with served() as server:
        url = server.url
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=LONG, timeout=60) as stream:
            next(stream.iter_lines())
            server.process.send_signal(signal.SIGTERM)
            assert until(lambda: HTTP.get(f"{url}/health").status_code == 503)
            assert HTTP.get(f"{url}/health").json() == {"status": "draining"}
            late = post(url, LONG)
            refused(late, 503, None, "going down")
            assert late.headers["retry-after"]
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            assert server.ended(15) == 0


def test_what_outlasts_the_drain_is_told_in_its_stream() -> None:
    with served("--drain-seconds", "0.3") as server:
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=LONG, timeout=60) as stream:
            events = (line for line in stream.iter_lines() if line)
            next(events)
            server.process.send_signal(signal.SIGTERM)
            last = list(events)[-1]
        assert "closed" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert server.ended(15) == 0


def test_a_log_on_a_full_disk_stops_nobody() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cabochon", "serve", "--port", str(port)]
        process = subprocess.Popen(command, stderr=full, stdout=full, env=ENVIRONMENT)
    try:
        url = f"http://127.0.0.1:{port}"
        assert until(lambda: answered(url), 60)
        for _ in range(3):
            refused(post(url, {"model": DEMO}), 400, "messages")
            body = {"model": DEMO, "messages": say("Who are you?"), "max_tokens": 2}
            assert post(url, body).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()


def test_what_is_loaded_is_no_garbage(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection that looks through it holds every thread up, for 160 ms at times."""
    frozen: list[int] = []
    monkeypatch.setattr(Server, "run", lambda *_, **__: frozen.append(gc.get_freeze_count()))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with bind("127.0.0.1", 0) as listener:
            serve(llm, Settings(), listener, lambda: None)
    finally:
        gc.unfreeze()
        signal.signal(signal.SIGTERM, before)
    assert frozen[0] > 100_000


def answered(url: str) -> bool:
    try:
        return HTTP.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")  # whichever thread has started them
    return [int(child) for task in tasks for child in task.read_text().split()]


def test_processes_that_are_killed() -> None:
    """The template's process is started anew; of a server that was killed nothing is left."""
    with served() as server:
        body = {"model": DEMO, "messages": say("Who are you?"), "max_tokens": 2}
        (renderer,) = children(server.process.pid)
        os.kill(renderer, signal.SIGKILL)
        assert post(server.url, body).status_code == 200
        (renderer,) = children(server.process.pid)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=LONG) as stream:
            events = stream.iter_lines()
            next(events)
            server.process.kill()
            with pytest.raises(httpx.TransportError):
                list(events)
        server.ended(10)
        assert until(lambda: not Path(f"/proc/{renderer}").exists(), 5)
        with bind("127.0.0.1", int(server.url.rpartition(":")[2])):
            pass


def test_the_settings_and_where_they_come_from(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('max_batch = 3\nport = 1\nmedia_hosts = ["a.example", "b.example"]\n')
    given = ("--config", file, "--port", "2", "--kv-cache-bytes", "1GiB", "--insecure")
    environment = {"CABOCHON_API_KEY": SECRET, "CABOCHON_ALLOW_ORIGINS": "http://a.b, http://c.d"}
    shown = cabochon("serve", *given, "--print-config", **environment)
    assert shown.returncode == 0
    assert SECRET not in shown.stdout + shown.stderr
    for line in (
        f"max_batch = 3  # {file}: max_batch",
        "port = 2  # --port",
        "kv_cache_bytes = 1073741824  # --kv-cache-bytes",
        "insecure = true  # --insecure",
        'allow_origins = ["http://a.b", "http://c.d"]  # CABOCHON_ALLOW_ORIGINS',
        "# api_key = (not shown)  # CABOCHON_API_KEY",
        'host = "127.0.0.1"  # default',
        "# threads =  # default",
    ):
        assert line in shown.stdout.splitlines()
    file.write_text(shown.stdout)
    again = load_settings({}, file)
    assert again == load_settings(tomllib.loads(shown.stdout))
    assert (again.port, again.media_hosts) == (2, ("a.example", "b.example"))
