"""How fast a checkpoint runs here, beside what this machine could do at most in the same minute."""

from __future__ import annotations

import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from cabochon.engine.request import Delta, SamplingParams
from cabochon.gemma4.text import DecoderLayer
from cabochon.kernels.arena import settled
from cabochon.kernels.floats import FloatsWeight
from cabochon.kernels.library import address, library
from cabochon.kernels.packed import PackedWeight
from cabochon.kernels.sketch import SketchedHead
from cabochon.llm import LLM

_READ = 1 << 29  # bytes, far more than caches hold
_TURNS = 200_000  # of the arithmetic that has its peak measured


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine does when it does nothing else; 0 without the compiled kernels."""

    read: float  # bytes a second
    multiply: float  # additions and multiplications of small integers a second


@dataclass(frozen=True, slots=True)
class Rate:
    """What was measured with some streams, each of some tokens of prompt."""

    streams: int
    prompt: int
    first: float  # seconds to the first token of each
    prefill: float  # prompt tokens a second, of all streams together
    decode: float  # tokens a second, of all streams together
    share: float  # of the bytes that one step reads, by what could be read in its time


@dataclass(frozen=True, slots=True)
class Bench:
    """All that `cabochon bench` tells."""

    model: str
    kernels: str
    threads: int
    load: float  # seconds
    step_bytes: int  # of weights that a token of one stream reads
    limits: Limits
    rates: tuple[Rate, ...] = field(default_factory=tuple)
    peak: int = 0  # bytes resident at most

    def as_dict(self) -> Mapping[str, Any]:
        return asdict(self)

    def lines(self) -> Iterator[str]:
        limits = self.limits
        yield f"{self.model}: {self.kernels}"
        yield (
            f"{self.threads} threads; loaded in {self.load:.1f} s; peak memory"
            f" {self.peak / 1e9:.2f} GB; a token reads {self.step_bytes / 1e9:.2f} GB of weights"
        )
        yield (
            f"this machine, in between: {limits.read / 1e9:.1f} GB/s read,"
            f" {limits.multiply / 1e9:.0f} billion operations a second"
        )
        yield "streams  prompt  first token  prefill tok/s  decode tok/s  of read bandwidth"
        for rate in self.rates:
            yield (
                f"{rate.streams:7}  {rate.prompt:6}  {rate.first:9.2f} s  {rate.prefill:13.1f}"
                f"  {rate.decode:12.2f}  {rate.share:16.0%}"
            )


def measure(
    llm: LLM,
    load: float,
    *,
    streams: Sequence[int],
    prompts: Sequence[int],
    tokens: int,
    rounds: int,
) -> Bench:
    """Every number of streams with every length of prompt, in turns with the machine's limits.

    Prompts are random, so that none is the beginning of another; medians of `rounds` are given,
    which begin when weights lie in large pages.
    """
    loaded = _peak()
    step = step_bytes(llm)
    seen: dict[tuple[int, int], list[Rate]] = {}
    limits: list[Limits] = []
    settled()
    for turn in range(rounds):
        for count in streams:
            for prompt in prompts:
                limits.append(machine())
                rate = _rate(llm, count, prompt, tokens, step, limits[-1], seed=turn)
                seen.setdefault((count, prompt), []).append(rate)
    middle = Limits(
        statistics.median(limit.read for limit in limits),
        statistics.median(limit.multiply for limit in limits),
    )
    return Bench(
        model=llm.name,
        kernels=llm.kernels.describe(),
        threads=torch.get_num_threads(),
        load=load,
        step_bytes=step,
        limits=middle,
        rates=tuple(_middle(rates) for rates in seen.values()),
        peak=max(loaded, _peak() - sum(len(room) for room in _rooms)),
    )


def _peak() -> int:
    """Bytes resident at most until now."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> Limits:
    """The machine's limits now: they drift on shared ones."""
    kernels, threads = library(), torch.get_num_threads()
    if kernels is None:
        return Limits(0.0, 0.0)
    data = _room()
    start = time.perf_counter()
    kernels.read(address(data), _READ, threads)
    middle = time.perf_counter()
    operations = kernels.peak(_TURNS, threads)
    return Limits(_READ / (middle - start), operations / (time.perf_counter() - middle))


_rooms: list[torch.Tensor] = []


def _room() -> torch.Tensor:
    """What is read, in large pages as weights are; written, or it would be one page of zeros."""
    if not _rooms:
        _rooms.append(torch.ones(_READ, dtype=torch.uint8))
        kernels = library()
        if kernels is not None:
            kernels.enlarge(_rooms[0].data_ptr(), _READ, 0)
    return _rooms[0]


def step_bytes(llm: LLM) -> int:
    """Bytes of the matrices that one token of the text model is multiplied with.

    Of a layer's experts as many as a token chooses; of tables that are looked up nothing.
    """
    text = llm.runner.model.model.language_model
    experts = llm.config.text.experts
    total = _bytes(text) + (_bytes(llm.runner.model.lm_head) if _has_head(llm) else 0)
    for layer in text.layers:
        if isinstance(layer, DecoderLayer) and layer.mixed:
            assert experts is not None
            total -= _bytes(layer.experts) * (experts.count - experts.chosen) // experts.count
    return total


def _bytes(module: nn.Module) -> int:
    """Of the matrices in `module` that kernels multiply with."""
    if isinstance(module, SketchedHead | PackedWeight):
        return module.nbytes
    if isinstance(module, FloatsWeight):
        return sum(buffer.nbytes for buffer in module.buffers())
    return sum(_bytes(child) for child in module.children())


def _has_head(llm: LLM) -> bool:
    return llm.runner.model.has_head


def _middle(rates: Sequence[Rate]) -> Rate:
    values = {
        name: statistics.median(getattr(rate, name) for rate in rates)
        for name in ("first", "prefill", "decode", "share")
    }
    return Rate(rates[0].streams, rates[0].prompt, **values)


def _rate(
    llm: LLM, count: int, prompt: int, tokens: int, step: int, limits: Limits, seed: int
) -> Rate:
    vocab = llm.config.text.vocab_size
    low = min(1000, vocab // 2)
    source = random.Random(seed * 1_000_003 + count * 1009 + prompt)
    params = SamplingParams(temperature=0.0, max_tokens=tokens + 1, ignore_eos=True)
    clocks: list[list[float]] = [[] for _ in range(count)]
    ended = threading.Semaphore(0)

    def sink(index: int, delta: Delta) -> None:
        if delta.tokens:
            clocks[index].append(time.perf_counter())
        if delta.finish_reason or delta.error:
            ended.release()

    start = time.perf_counter()
    for index in range(count):
        ids = [2, *(source.randrange(low, vocab) for _ in range(prompt - 1))]
        llm.engine.submit(llm.prompts.raw(ids), params, partial(sink, index))
    for _ in range(count):
        ended.acquire()
    # Decoding is what happens after the last of them has its first token.
    began = max(clock[0] for clock in clocks)
    later = [moment for clock in clocks for moment in clock if moment > began]
    seconds = max(later) - began
    decode = len(later) / seconds
    return Rate(
        streams=count,
        prompt=prompt,
        first=statistics.mean(clock[0] for clock in clocks) - start,
        prefill=count * prompt / (began - start),
        decode=decode,
        share=step * decode / count / limits.read if limits.read else 0.0,
    )
