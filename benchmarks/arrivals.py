"""Offered load as users offer it: Poisson arrivals or bursts, popular and rare variants, lengths like chats'.

One list of requests is made from a seed and then played against anything that streams tokens; every system that is
compared gets the very same list.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Arrival = Literal["poisson", "gamma"]
MEDIAN_PROMPT, MEDIAN_ANSWER, SPREAD = 130, 140, 1.1
"""Tokens, and the sigma of a log-normal: close to what is published of ShareGPT's conversations."""
BURSTINESS = 0.25
"""Shape of the gamma distribution of gaps: a coefficient of variation of 2."""


@dataclass(frozen=True)
class Offered:
    """One request of a load."""

    at: float
    """Seconds after the start."""
    variant: int
    """-1: the base."""
    prompt: tuple[int, ...]
    answer: int
    """Tokens to generate."""


@dataclass
class Timing:
    """When its tokens came, in seconds after the start."""

    offered: Offered
    sent: float = 0.0
    tokens: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Between one token and the next."""
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]


Ask = Callable[[Offered], AsyncIterator[int]]
"""Sends one request; yields how many tokens each event brings."""


def make_load(
    *,
    seconds: float,
    rate: float,
    variants: int,
    vocabulary: int,
    arrival: Arrival = "poisson",
    zipf: float = 1.0,
    longest: int = 1024,
    seed: int = 0,
) -> list[Offered]:
    """Requests of `seconds` at `rate` per second; variant i is asked for in proportion to 1 / (i + 1)^zipf.

    Args:
        variants: 0: only the base is asked.
        longest: prompts and answers are cut to this many tokens each.
    """
    random = np.random.default_rng(seed)
    shape = 1.0 if arrival == "poisson" else BURSTINESS
    count = max(1, round(seconds * rate))
    at = np.cumsum(random.gamma(shape, 1 / (rate * shape), count))
    weights = 1.0 / np.arange(1, max(variants, 1) + 1) ** zipf
    chosen = random.choice(len(weights), count, p=weights / weights.sum()) if variants else np.full(count, -1)
    lengths = np.exp(random.normal(0.0, SPREAD, (count, 2))) * (MEDIAN_PROMPT, MEDIAN_ANSWER)
    lengths = np.clip(lengths.astype(int), 4, longest)
    return [
        Offered(float(t), int(v), tuple(random.integers(3, vocabulary, p).tolist()), int(a))
        for t, v, (p, a) in zip(at, chosen, lengths, strict=True)
    ]


async def play(load: Sequence[Offered], ask: Ask) -> list[Timing]:
    """Send every request at its time, whether or not earlier ones are answered (an open loop)."""
    start = time.perf_counter()

    async def one(offered: Offered) -> Timing:
        timing = Timing(offered)
        await asyncio.sleep(max(0.0, offered.at - (time.perf_counter() - start)))
        timing.sent = time.perf_counter() - start
        try:
            async for count in ask(offered):
                timing.tokens += [time.perf_counter() - start] * count
        except Exception as error:
            timing.error = f"{type(error).__name__}: {error}"
        return timing

    return await asyncio.gather(*(one(offered) for offered in load))


def summary(timings: Sequence[Timing]) -> dict[str, Any]:
    """Tokens per second over the whole run, time to first token and gaps between tokens in milliseconds."""
    done = [t for t in timings if t.tokens]
    gaps = [gap for t in done for gap in t.gaps]
    produced = sum(len(t.tokens) for t in done)
    prompts = sum(len(t.offered.prompt) for t in done)
    end = max((t.tokens[-1] for t in done), default=0.0)
    return {
        "requests": len(timings),
        "failed": sum(bool(t.error) for t in timings),
        "first_error": next((t.error for t in timings if t.error), ""),
        "seconds": round(end, 2),
        "tokens_per_s": round(produced / end, 1) if end else 0.0,
        "prompt_tokens_per_s": round(prompts / end, 1) if end else 0.0,
        **_percentiles("ttft_ms", [t.ttft for t in done]),
        **_percentiles("itl_ms", gaps),
        "longest_gap_ms": round(1e3 * max(gaps, default=0.0), 2),
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    p50, p99 = np.percentile(seconds, [50, 99])
    return {f"{name}_p50": round(1e3 * float(p50), 2), f"{name}_p99": round(1e3 * float(p99), 2)}
