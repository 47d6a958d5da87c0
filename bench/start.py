"""From the start of a process to its first token: Cabochon and llama.cpp in turns.

    python bench/start.py MODEL [--theirs OTHER.gguf] [--threads 2] [--rounds 5] [--without-llama]

Needs llama-cpp-python, unless it is left out; where MODEL is no GGUF, it loads another. Each start
is a process of its own, timed from before it exists, as a user waits for it: Python, imports,
weights, a prompt of 9 tokens. `cabochon run` is timed to the first character that it prints. A
first round that does not count leaves the file in memory, and memory that the system has at hand: a
virtual machine may have to ask its host for pages that nobody used of late, and then pages cost
more than all else. Processor time tells such a system by its share.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module

from versus_llama import cabochon, llama

PROMPT = [2, *range(1000, 1008)]
CONTEXT = 1024
ENGINES = {"cabochon": cabochon, "llama.cpp": llama}
IMPORTS = {"cabochon": ("cabochon", "LLM"), "llama.cpp": ("llama_cpp", "Llama")}

Times = dict[str, float]


def child(engine: str, model: str, threads: int) -> None:
    """Start `engine`, and say when what was done: a clock that all processes share."""
    module, name = IMPORTS[engine]
    getattr(import_module(module), name)
    times = {"imported": time.monotonic()}
    generate = ENGINES[engine](model, threads, CONTEXT)
    times["loaded"] = time.monotonic()
    next(iter(generate(PROMPT)))
    times["first token"] = time.monotonic()
    print(json.dumps(times | used(resource.RUSAGE_SELF)), flush=True)


def used(who: int) -> Times:
    usage = resource.getrusage(who)
    return {
        "user": usage.ru_utime,
        "system": usage.ru_stime,
        "peak memory, GB": usage.ru_maxrss / 1e6,
    }


def started(engine: str, model: str, threads: int) -> Times:
    command = [sys.executable, __file__, model, "--threads", str(threads), "--child", engine]
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    told: Times = json.loads(done.stdout.splitlines()[-1])
    stamps = ("imported", "loaded", "first token")
    return {name: value - start if name in stamps else value for name, value in told.items()}


def command(_: str, model: str, threads: int) -> Times:
    """`cabochon run` to the first character; what it uses is not told apart from what follows."""
    line = [sys.executable, "-m", "cabochon", "run", model, "--threads", str(threads)]
    line += ["--prompt", "Hello", "--max-tokens", "1", "--temperature", "0"]
    start = time.monotonic()
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.monotonic() - start
    return {"first token": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--theirs", help="what llama.cpp loads, if it is another file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-llama", action="store_true")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.model, arguments.threads)
    ways: dict[str, Callable[[str, str, int], Times]] = {"cabochon": started}
    ways |= {} if arguments.without_llama else {"llama.cpp": started}
    ways |= {"cabochon run": command}
    seen: dict[str, list[Times]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, way in ways.items():
            model = arguments.theirs if name == "llama.cpp" else None
            found = way(name, model or arguments.model, arguments.threads)
            if turn:
                seen[name].append(found)
    print(f"seconds from the start of the process, medians of {arguments.rounds} (and all)")
    for name, rounds in seen.items():
        print(name)
        for what in rounds[0]:
            values = [found[what] for found in rounds]
            each = ", ".join(f"{value:.2f}" for value in values)
            print(f"  {what:16} {statistics.median(values):6.2f}  ({each})")
    return None


if __name__ == "__main__":
    main()
