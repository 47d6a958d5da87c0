"""Cabochon and llama.cpp on the same GGUF, or each on a file of its own, in turns.

    python bench/versus_llama.py MODEL.gguf [--theirs OTHER.gguf] [--threads 2] [--rounds 5]
        [--prompts 8,512,2048,4096] [--least 60]

Needs llama-cpp-python. Each engine lives in a process of its own, loaded once; rounds begin when
Cabochon has moved its weights into large pages. They alternate between both, so that a machine
whose speed drifts is the same for them, and medians are compared. A third process says around each
round what the memory gives to threads that only read; with `--least`, a round counts only if it
was so many GB/s before and behind it.
A rate by the clock says what a user sees. One by processor time leaves out what other processes
took; with one thread it can be trusted on a machine that is not idle.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

DECODED = 16  # tokens after the first

Generate = Callable[[list[int]], Iterator[object]]  # a prompt to something for each token


def cabochon(model: str, threads: int, context: int) -> Generate:
    from cabochon import LLM, SamplingParams

    llm = LLM(model, threads=threads, max_context=context, kv_cache_bytes=1 << 30, draft_tokens=0)
    params = SamplingParams(temperature=0.0, max_tokens=DECODED + 1, ignore_eos=True)

    def generate(prompt: list[int]) -> Iterator[object]:
        with llm.stream(llm.prompts.raw(prompt), params) as stream:
            yield from (delta for delta in stream if delta.tokens)

    return generate


def llama(model: str, threads: int, context: int) -> Generate:
    from llama_cpp import Llama

    llm = Llama(
        model, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
    )

    def generate(prompt: list[int]) -> Iterator[object]:
        llm.reset()
        llm.eval(prompt)
        yield None
        for token in range(DECODED):
            llm.eval([400 + token])
            yield None

    return generate


def work(engine: Callable[..., Generate], pipe: Connection, *arguments: Any) -> None:
    """Load, say how long that took, and then generate for each prompt that comes."""
    start = time.perf_counter()
    generate = engine(*arguments)
    pipe.send({"load": time.perf_counter() - start})
    if engine is cabochon:
        from cabochon.kernels.arena import settled

        settled()
    while (prompt := pipe.recv()) is not None:
        clocks = [(time.perf_counter(), time.process_time())]
        for _ in generate(prompt):
            clocks.append((time.perf_counter(), time.process_time()))
        first, last = clocks[1], clocks[-1]
        made = {}
        for index, name in enumerate(("clock", "cpu")):
            made[f"prefill {name}"] = len(prompt) / (first[index] - clocks[0][index])
            made[f"decode {name}"] = (len(clocks) - 2) / (last[index] - first[index])
        made["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        pipe.send(made)


def read(pipe: Connection, threads: int) -> None:
    """Say how many GB a second can be read, as often as somebody asks."""
    import torch

    from cabochon.bench import machine

    torch.set_num_threads(threads)
    while pipe.recv() is not None:
        pipe.send(machine().read / 1e9)


def turns(
    pipes: dict[str, Connection], memory: Connection, prompt: list[int]
) -> tuple[float, dict[str, dict[str, float]]]:
    """What each engine made of the prompt, and what could be read at least, before or behind it."""
    memory.send(True)
    before, made = memory.recv(), {}
    for name, pipe in pipes.items():
        pipe.send(prompt)
        made[name] = pipe.recv()
    memory.send(True)
    return min(before, memory.recv()), made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--theirs", help="what llama.cpp loads, if it is another file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", default="8,512,2048,4096")
    parser.add_argument("--least", type=float, default=0.0, help="GB/s that a round must have")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.prompts.split(",")]
    context = max(sizes) + 64
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for engine in (cabochon, llama):  # one loads after the other
        ours, theirs = spawn.Pipe()
        model = arguments.theirs or arguments.model if engine is llama else arguments.model
        inputs = (engine, theirs, model, arguments.threads, context)
        spawn.Process(target=work, args=inputs, daemon=True).start()
        pipes[engine.__name__] = ours
        print(f"{engine.__name__:9} loaded in {ours.recv()['load']:.1f} s", flush=True)
    memory, theirs = spawn.Pipe()
    spawn.Process(target=read, args=(theirs, arguments.threads), daemon=True).start()
    generator = random.Random(0)
    for size in sizes:
        limits: list[float] = []
        seen: dict[str, dict[str, list[float]]] = {name: {} for name in pipes}
        while len(limits) < arguments.rounds:
            prompt = [2, *(generator.randrange(1000, 200_000) for _ in range(size - 1))]
            limit, made = turns(pipes, memory, prompt)
            if limit < arguments.least:
                continue
            limits.append(limit)
            for name, figures in made.items():
                for what, value in figures.items():
                    seen[name].setdefault(what, []).append(value)
        one, other = ({k: statistics.median(v) for k, v in s.items()} for s in seen.values())
        can = statistics.median(limits)
        print(f"prompt of {size} tokens, medians of {arguments.rounds}; {can:.1f} GB/s can be read")
        for what in one:
            unit = "GB" if what == "peak" else "tokens/s"
            print(
                f"  {what:14} cabochon {one[what]:8.2f}  llama.cpp {other[what]:8.2f} {unit}"
                f"  ratio {one[what] / other[what]:5.2f}",
                flush=True,
            )
    for pipe in (*pipes.values(), memory):
        pipe.send(None)


if __name__ == "__main__":
    main()
