"""Every series of this application: names, labels and buckets in one table, and who writes them.

Names are vLLM's with the prefix `bitdelta_`, and so are the buckets; Ray exports them as `ray_bitdelta_*`. No label
names a tenant or a variant: there may be many thousands of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast

from ray.serve.metrics import Counter, Gauge, Histogram

from bitdelta_core.engine.api import EngineStats, TokenEvent

PREFIX = "bitdelta_"
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_TIME_BUCKETS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


@dataclass(frozen=True, slots=True)
class Spec:
    """One series, as Ray exports it without the prefix `ray_bitdelta_`."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SERIES: Mapping[str, Spec] = {
    "num_requests_running": Spec("gauge", "Choices computed in the last step."),
    "num_requests_waiting": Spec("gauge", "Choices that wait for a place in the batch."),
    "num_requests_waiting_for_delta": Spec("gauge", "Requests whose delta is not in the slab yet."),
    "kv_cache_usage_perc": Spec("gauge", "Share of the KV blocks in use; 1 is full."),
    "slab_usage_perc": Spec("gauge", "Share of the slab's bytes in use; 1 is full."),
    "deltas_resident": Spec("gauge", "Deltas in the slab."),
    "prompt_tokens_total": Spec("counter", "Prompt tokens taken in."),
    "generation_tokens_total": Spec("counter", "Tokens generated."),
    "prefix_cache_queries_total": Spec("counter", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits_total": Spec("counter", "Prompt tokens found there."),
    "num_preemptions_total": Spec("counter", "Sequences put back because KV blocks ran out."),
    "delta_loads_total": Spec("counter", "Deltas brought into the slab."),
    "delta_load_failures_total": Spec("counter", "Loads that failed."),
    "delta_evictions_total": Spec("counter", "Deltas that left the slab for others."),
    "engine_steps_total": Spec("counter", "Forward passes."),
    "kernels_compiled_total": Spec("counter", "Kernels compiled: pauses of seconds, if not at the start."),
    "kernel_compile_seconds_total": Spec("counter", "Time that compiling kernels took."),
    "request_success_total": Spec("counter", "Choices finished.", ("finished_reason",)),
    "request_failures_total": Spec("counter", "Requests that ended in an error.", ("code",)),
    "http_requests_total": Spec("counter", "HTTP requests answered.", ("route", "status")),
    "time_to_first_token_seconds": Spec("histogram", "From arrival at the replica.", (), TTFT_BUCKETS),
    "inter_token_latency_seconds": Spec("histogram", "Between the tokens of a choice.", (), TOKEN_TIME_BUCKETS),
    "e2e_request_latency_seconds": Spec("histogram", "From arrival at the replica.", (), LATENCY_BUCKETS),
    "request_prompt_tokens": Spec("histogram", "Prompt length.", (), LENGTH_BUCKETS),
    "request_generation_tokens": Spec("histogram", "Tokens per choice.", (), LENGTH_BUCKETS),
}
COUNTED: Mapping[str, str] = {
    "prompt_tokens_total": "prompt_tokens_total",
    "generation_tokens_total": "generation_tokens_total",
    "prefix_cache_queries_total": "prefix_cache_queries_total",
    "prefix_cache_hits_total": "prefix_cache_hits_total",
    "num_preemptions_total": "preemptions_total",
    "delta_loads_total": "delta_loads_total",
    "delta_load_failures_total": "delta_load_failures_total",
    "delta_evictions_total": "delta_evictions_total",
    "engine_steps_total": "steps_total",
    "kernels_compiled_total": "kernels_compiled_total",
    "kernel_compile_seconds_total": "kernel_compile_seconds_total",
}
"""Counters that follow a field of EngineStats."""


@cache
def metric(name: str) -> Counter | Gauge | Histogram:
    """The metric of this process. In a Serve replica, Ray adds application, deployment and replica as labels.

    Ray appends `_total` to counters itself.
    """
    spec = SERIES[name]
    labels = cast("tuple[str]", spec.labels)  # Ray's annotation says one label; any number works
    if spec.kind == "counter":
        return Counter(PREFIX + name.removesuffix("_total"), spec.help, tag_keys=labels)
    if spec.kind == "gauge":
        return Gauge(PREFIX + name, spec.help, tag_keys=labels)
    return Histogram(PREFIX + name, spec.help, boundaries=list(spec.buckets), tag_keys=labels)


def count(name: str, amount: float = 1.0, **labels: str) -> None:
    counter = metric(name)
    assert isinstance(counter, Counter)
    if amount > 0:
        counter.inc(amount, tags=labels)


def observe(name: str, value: float) -> None:
    histogram = metric(name)
    assert isinstance(histogram, Histogram)
    histogram.observe(value)


def gauge(name: str, value: float) -> None:
    found = metric(name)
    assert isinstance(found, Gauge)
    found.set(value)


class EngineMetrics:
    """Turns snapshots of one engine into gauges and counter increments."""

    def __init__(self) -> None:
        self._last = EngineStats()

    def update(self, stats: EngineStats) -> None:
        gauge("num_requests_running", stats.running)
        gauge("num_requests_waiting", stats.waiting)
        gauge("num_requests_waiting_for_delta", stats.waiting_for_delta)
        gauge("kv_cache_usage_perc", stats.kv_blocks_used / max(1, stats.kv_blocks_total))
        gauge("slab_usage_perc", stats.slab_bytes_used / max(1, stats.slab_bytes_total))
        gauge("deltas_resident", len(stats.resident))
        for name, attribute in COUNTED.items():
            count(name, getattr(stats, attribute) - getattr(self._last, attribute))
        self._last = stats


class RequestTimer:
    """One request at a replica, from arrival to its last token."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last: dict[int, float] = {}

    def saw(self, events: Sequence[TokenEvent]) -> None:
        """What came together: of a choice, each token as long after the last one as the others."""
        now, before = time.monotonic(), dict(self._last)
        for event in events:
            if event.token_ids or event.finish_reason is not None:
                together = sum(len(e.token_ids) for e in events if e.index == event.index)
                self._one(event, now, before, together)

    def _one(self, event: TokenEvent, now: float, before: Mapping[int, float], tokens: int) -> None:
        if event.token_ids and event.index in before:
            observe("inter_token_latency_seconds", (now - before[event.index]) / tokens)
        elif event.token_ids and not self._last:
            observe("time_to_first_token_seconds", now - self._began)
            observe("request_prompt_tokens", event.prompt_tokens)
        self._last[event.index] = now
        if event.finish_reason is not None:
            count("request_success_total", finished_reason=event.finish_reason)
            observe("e2e_request_latency_seconds", now - self._began)
            observe("request_generation_tokens", event.completion_tokens)
