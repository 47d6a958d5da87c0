"""`/metrics`: what the engine counted, under the names that dashboards for vLLM already ask for.

Numbers are read when somebody asks; nothing here is called for a token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client import Histogram as TimeHistogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from cabochon import __version__
from cabochon.engine.cache import PAGE
from cabochon.engine.engine import Engine
from cabochon.engine.stats import Histogram
from cabochon.llm import LLM

LAG_EVERY = 0.1  # seconds between two looks at the event loop

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_LAGS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_LABELS = ("model_name", "engine")


class EngineCollector(Collector):
    """The engine's counters as they are at the moment."""

    def __init__(self, llm: LLM) -> None:
        self._engine: Engine = llm.engine
        self._labels = (llm.name, "0")
        self._about = {
            "version": __version__,
            "model_name": llm.name,
            "plan_hash": llm.report.hash or "",
        }

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "cabochon:build", "What is served, by which version, loaded how", self._about
        )
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()

    def _gauges(self) -> Iterator[Metric]:
        engine, plan = self._engine, self._engine.cache.plan
        running = engine.running
        pages = [
            (total, free)
            for total, free in zip(plan.pages, engine.cache.free_pages(), strict=True)
            if total
        ]
        used = max((1 - free / total for total, free in pages), default=0.0)
        yield self._gauge("num_requests_running", "Requests computed on", running)
        yield self._gauge("num_requests_waiting", "Requests in line", engine.load - running)
        yield self._gauge("kv_cache_usage_perc", "Share of the cache's pages in use", used)
        info = {
            **dict(zip(_LABELS, self._labels, strict=True)),
            "block_size": str(PAGE),
            "num_cpu_blocks": str(max(plan.pages)),
        }
        config = GaugeMetricFamily("vllm:cache_config_info", "The cache", labels=tuple(info))
        config.add_metric(tuple(info.values()), 1)
        yield config

    def _counters(self) -> Iterator[Metric]:
        stats, scheduler = self._engine.stats, self._engine.scheduler
        hits = scheduler.prefix_hits
        for name, about, value in (
            ("prompt_tokens", "Tokens of prompts, computed or found", stats.prefill_tokens + hits),
            ("generation_tokens", "Tokens generated", stats.generated),
            ("prefix_cache_queries", "Tokens looked up in the cache", scheduler.prefix_queries),
            ("prefix_cache_hits", "Tokens found in the cache", hits),
            ("spec_decode_num_drafts", "Steps of a request with guesses", stats.guessed_times),
            ("spec_decode_num_draft_tokens", "Tokens guessed", stats.guessed),
            ("spec_decode_num_accepted_tokens", "Guessed right", stats.guessed_right),
            ("num_preemptions", "Requests put off for want of pages", scheduler.preemptions),
        ):
            yield self._counter(name, about, value)
        right = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Guessed right, by place among the guesses of a step",
            labels=(*_LABELS, "position"),
        )
        for place, count in sorted(stats.guessed_right_at.items()):
            right.add_metric((*self._labels, str(place)), count)
        yield right
        ended = CounterMetricFamily(
            "vllm:request_success", "Requests ended", labels=(*_LABELS, "finished_reason")
        )
        for reason in sorted({"stop", "length", "abort", "error"} | set(stats.ended)):
            ended.add_metric((*self._labels, reason), stats.ended[reason])
        yield ended

    def _histograms(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for name, about, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token", stats.first_token),
            ("inter_token_latency_seconds", "From token to token", stats.interval),
            ("e2e_request_latency_seconds", "From arrival to the last token", stats.whole),
            ("request_queue_time_seconds", "From arrival to the first step", stats.queue),
            ("request_prefill_time_seconds", "From there to the first token", stats.prefill),
            ("request_decode_time_seconds", "From there to the last token", stats.decode),
            ("request_prompt_tokens", "Tokens of a prompt", stats.prompt_length),
            ("request_generation_tokens", "Tokens of an answer", stats.answer_length),
            ("iteration_tokens_total", "Tokens of a step", stats.step_length),
        ):
            family = HistogramMetricFamily(f"vllm:{name}", about, labels=_LABELS)
            family.add_metric(self._labels, _buckets(histogram), histogram.sum)
            yield family

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", about, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", about, labels=_LABELS)
        family.add_metric(self._labels, value)
        return family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))


class Metrics:
    """The registry of one application: its engine, its requests, its event loop."""

    def __init__(self, llm: LLM) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(llm))
        self._requests = Counter(
            "http_requests", "Requests answered", ("method", "handler", "status"),
            registry=self._registry,
        )  # fmt: skip
        self._seconds = TimeHistogram(
            "http_request_duration_seconds", "From a request's headers to the end of its answer",
            ("method", "handler"), buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._lag = TimeHistogram(
            "cabochon:event_loop_lag_seconds", "How late the event loop comes to what is due",
            buckets=_LAGS, registry=self._registry,
        )  # fmt: skip
        self._tasks = Gauge(
            "cabochon:event_loop_tasks", "Tasks on the event loop", registry=self._registry
        )

    def request(self, method: str, handler: str, status: int, seconds: float) -> None:
        """Count a request that ended. A method may be any word: each would be counted for ever."""
        method = method if method in _METHODS else "other"
        self._requests.labels(method, handler, str(status)).inc()
        self._seconds.labels(method, handler).observe(seconds)

    async def watch_loop(self) -> None:
        """Measure for ever how late the event loop is."""
        while True:
            due = time.monotonic() + LAG_EVERY
            await asyncio.sleep(LAG_EVERY)
            self._lag.observe(max(0.0, time.monotonic() - due))

    def text(self) -> bytes:
        """Everything, in Prometheus' text format 0.0.4. Called on the event loop."""
        self._tasks.set(len(asyncio.all_tasks()))
        return generate_latest(self._registry)
