"""Five minutes of many clients at once, good and bad ones, against a server of the demo.

    python bench/load.py [--seconds 300] [--clients 64]

Prints a table for docs/reliability.md. Exit status 1: an answer that was not to be expected,
something left behind, memory that grew, or an event loop that was late.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from PIL import Image

MODEL = "cabochon-demo"
QUESTIONS = ("Who are you?", "What is 3 plus 4?", "Tell me something.", "What colour is the sky?")
CHAT = "/v1/chat/completions"
BODY_LIMIT = 2**20
WARM_SECONDS = 60  # until cache and allocator have what they keep
FLAT = 0.05  # of the memory of the first fifth that the last one may have more

Samples = dict[str, float]


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(rng: random.Random, **fields: object) -> bytes:
    content: object = rng.choice(QUESTIONS)
    if rng.random() < 0.1:
        shown = {"type": "image_url", "image_url": {"url": picture()}}
        content = [shown, {"type": "text", "text": "What colour is this rectangle?"}]
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": rng.randint(4, 80),
        "ignore_eos": True,
        **fields,
    }
    return json.dumps(body).encode()


class Client:
    """One of many; each of its methods is a thing that clients do."""

    def __init__(self, port: int, seed: int, seen: Counter[str]) -> None:
        self.port = port
        self.rng = random.Random(seed)
        self.seen = seen

    async def live(self, end: float) -> None:
        actions: list[tuple[Callable[[], Awaitable[str]], float]] = [
            (self.stream, 50),
            (self.bound_answer, 4),
            (self.other_endpoint, 8),
            (self.answer, 12),
            (self.leave_stream, 12),
            (self.leave_early, 4),
            (self.oversized, 3),
            (self.malformed, 4),
            (self.unknown_field, 3),
            (self.half_a_head, 1),
        ]
        what, weights = zip(*actions, strict=True)
        while time.monotonic() < end:
            action = self.rng.choices(what, weights)[0]
            try:
                outcome = await asyncio.wait_for(action(), 120)
            except Exception as error:
                outcome = f"unexpected: {type(error).__name__}: {error}"
            self.seen[f"{action.__name__.replace('_', ' ')}: {outcome}"] += 1

    async def stream(self) -> str:
        reader, writer = await self._post(question(self.rng, stream=True))
        status = await self._status(reader)
        text = (await reader.read()).decode()
        writer.close()
        if status == 200:
            return "200" if "data: [DONE]" in text and '"error"' not in text else "unexpected end"
        return str(status) if status == 429 else f"unexpected {status}"

    async def answer(self) -> str:
        return await self._whole(question(self.rng), 200, 429)

    async def bound_answer(self) -> str:
        choices = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}}
        schema = {**choices, "required": ["colour"], "additionalProperties": False}
        shape = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}}
        return await self._whole(question(self.rng, response_format=shape), 200, 429)

    async def other_endpoint(self) -> str:
        words = self.rng.choice(QUESTIONS)
        messages = [{"role": "user", "content": words}]
        path, body = self.rng.choice(
            [
                ("/v1/completions", {"prompt": words, "max_tokens": 20, "logprobs": 2}),
                ("/v1/responses", {"input": words, "max_output_tokens": 20}),
                ("/v1/messages", {"messages": messages, "max_tokens": 20}),
                ("/tokenize", {"prompt": words}),
            ]
        )
        body = {"model": MODEL, **body}
        return await self._whole(json.dumps(body).encode(), 200, 429, path=path)

    async def leave_stream(self) -> str:
        reader, writer = await self._post(question(self.rng, stream=True, max_tokens=1000))
        status = await self._status(reader)
        with suppress(TimeoutError):
            await asyncio.wait_for(reader.read(), self.rng.random() * 2)
        writer.transport.abort()
        return f"left after {status}" if status in (200, 429) else f"unexpected {status}"

    async def leave_early(self) -> str:
        _, writer = await self._post(question(self.rng, stream=self.rng.random() < 0.5))
        await asyncio.sleep(self.rng.random() * 0.05)
        writer.transport.abort()
        return "left"

    async def oversized(self) -> str:
        return await self._whole(question(self.rng, user="a" * (BODY_LIMIT + 10)), 413, 429)

    async def malformed(self) -> str:
        body = question(self.rng)
        return await self._whole(body[: self.rng.randrange(len(body))], 400, 429)

    async def unknown_field(self) -> str:
        return await self._whole(question(self.rng, temprature=1), 400, 429)

    async def half_a_head(self) -> str:
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: local")
        await asyncio.sleep(self.rng.random())
        writer.transport.abort()
        return "left"

    async def _whole(self, body: bytes, *expected: int, path: str = CHAT) -> str:
        reader, writer = await self._post(body, path)
        status = await self._status(reader)
        await reader.read()
        writer.close()
        return str(status) if status in expected else f"unexpected {status}"

    async def _post(
        self, body: bytes, path: str = CHAT
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        return reader, writer

    async def _status(self, reader: asyncio.StreamReader) -> int:
        head = await reader.readuntil(b"\r\n\r\n")
        return int(head.split()[1])


async def metrics(port: int) -> Samples:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    found = re.findall(r"^([\w:]+(?:\{.*?\})?) (\S+)$", text, re.MULTILINE)
    return {re.sub(r'(engine|model_name)="[^"]*",?', "", name): float(v) for name, v in found}


def holdings(pid: int) -> Samples:
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "memory, MB": int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024,
        "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
        "open files": len(os.listdir(f"/proc/{pid}/fd")),
    }


async def at_rest(port: int, pid: int) -> Samples:
    """What the server holds when nobody asks it anything."""
    for _ in range(300):
        now = await metrics(port)
        if not now["vllm:num_requests_running{}"] + now["vllm:num_requests_waiting{}"]:
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(1)
    now = await metrics(port)
    return {
        "requests running": now["vllm:num_requests_running{}"],
        "requests waiting": now["vllm:num_requests_waiting{}"],
        "share of pages in use": now["vllm:kv_cache_usage_perc{}"],
        "tasks": now["cabochon:event_loop_tasks"],
        **holdings(pid),
    }


def late(before: Samples, after: Samples, share: float) -> float:
    """The bucket of the loop's lag below which `share` of the observations lie."""
    name = "cabochon:event_loop_lag_seconds"
    total = after[f"{name}_count"] - before.get(f"{name}_count", 0.0)
    for key, value in after.items():
        bound = re.fullmatch(rf'{name}_bucket{{le="(.+)"}}', key)
        if bound and value - before.get(key, 0.0) >= share * total:
            return float(bound[1])
    return float("inf")


async def bench(port: int, pid: int, clients: int, seconds: float) -> bool:
    seen: Counter[str] = Counter()
    warm = time.monotonic() + WARM_SECONDS
    await asyncio.gather(*[Client(port, 1000 + i, Counter()).live(warm) for i in range(clients)])
    rest, before = await at_rest(port, pid), await metrics(port)
    memory: list[float] = []
    end = time.monotonic() + seconds
    running = [asyncio.create_task(Client(port, i, seen).live(end)) for i in range(clients)]
    while time.monotonic() < end:
        await asyncio.sleep(2)
        memory.append(holdings(pid)["memory, MB"])
    await asyncio.gather(*running)
    after = await metrics(port)
    left = await at_rest(port, pid)

    print("| what clients did | outcome | times |\n|---|---|---|")
    for what, times in sorted(seen.items()):
        print("| {} | {} | {:,} |".format(*what.split(": ", 1), times))
    tokens = after["vllm:generation_tokens_total{}"] - before["vllm:generation_tokens_total{}"]
    print(f"\n{sum(seen.values()):,} requests, {tokens / seconds:,.0f} tokens generated a second\n")
    print("| the server holds | before | after |\n|---|---|---|")
    for name, value in rest.items():
        print(f"| {name} | {value:,.6g} | {left[name]:,.6g} |")
    fifth = max(1, len(memory) // 5)
    first, last = statistics.median(memory[:fifth]), statistics.median(memory[-fifth:])
    print(f"\nmemory under load: {first:.0f} MB in the first fifth, {last:.0f} MB in the last")
    lags = {share: late(before, after, share) for share in (0.5, 0.99, 0.999)}
    print(
        "event loop late by at most:",
        ", ".join(f"{b * 1e3:g} ms ({s:.1%})" for s, b in lags.items()),
    )
    checks = {
        "no unexpected answer": not any("unexpected" in what for what in seen),
        "nothing left behind": all(
            left[n] <= rest[n]
            for n in ("requests running", "requests waiting", "share of pages in use", "tasks")
        )
        and left["open files"] <= rest["open files"] + 2,
        "flat memory": last <= first * (1 + FLAT),
        "loop at the 99th percentile within 50 ms": lags[0.99] <= 0.05,
    }
    for name, passed in checks.items():
        print(f"{'yes' if passed else 'NO '}  {name}")
    return all(checks.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    command = [sys.executable, "-m", "cabochon", "serve", "--port", "0", "--log-level", "error"]
    command += ["--max-body-bytes", str(BODY_LIMIT), "--kv-cache-bytes", "64MiB", "--threads", "2"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        ready = next(line for line in server.stderr if line.startswith("ready: "))
        port = int(re.findall(r":(\d+) ", ready)[0])
        passed = asyncio.run(bench(port, server.pid, options.clients, options.seconds))
        server.send_signal(signal.SIGTERM)
        rest = server.stderr.read()
        said = [line for line in rest.splitlines() if " ERROR " in line or "Traceback" in line]
        print(f"{'NO ' if said else 'yes'}  nothing in the log")
        passed = passed and not said and server.wait(30) == 0
    finally:
        server.kill()
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
