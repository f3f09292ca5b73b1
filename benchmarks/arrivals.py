"""Offered load as users offer it: Poisson arrivals or bursts, popular and rare variants, lengths like chats'.

One list of requests is made from a seed and then played against anything that streams tokens; every system that is
compared gets the very same list. The figures are of a window in which arrivals go on all the time: neither the start,
when nothing is under way yet, nor a tail of long answers that nobody disturbs counts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Arrival = Literal["poisson", "gamma"]
MEDIAN_PROMPT, MEDIAN_ANSWER, SPREAD = 130, 140, 1.1
"""Tokens, and the sigma of a log-normal: close to what is published of ShareGPT's conversations."""
BURSTINESS = 0.25
"""Shape of the gamma distribution of gaps: a coefficient of variation of 2."""
RAMP = 1 / 3
"""Of a load's duration: it is left out of the figures."""


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
    tokens: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def ttft(self) -> float:
        """From when it was due: a client that is late itself hides nothing."""
        return self.tokens[0] - self.offered.at

    @property
    def unfinished(self) -> bool:
        return not self.error and len(self.tokens) < self.offered.answer

    def gaps(self, start: float, stop: float) -> list[float]:
        """Between one token and the next, where the next came from `start` to `stop`. Zero within one event."""
        pairs = zip(self.tokens, self.tokens[1:], strict=False)
        return [b - a for a, b in pairs if start <= b <= stop]


Ask = Callable[[Offered], AsyncGenerator[int]]
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
    content: int = 0,
) -> list[Offered]:
    """Requests of `seconds` at `rate` per second; variant i is asked for in proportion to 1 / (i + 1)^zipf.

    Args:
        variants: 0: only the base is asked.
        longest: prompts and answers are cut to this many tokens each.
        content: another one gives other tokens at the same times in the same lengths, so that who has seen the load
            before finds no prompt in its prefix cache.
    """
    random = np.random.default_rng(seed)
    shape = 1.0 if arrival == "poisson" else BURSTINESS
    count = max(1, round(seconds * rate))
    at = np.cumsum(random.gamma(shape, 1 / (rate * shape), count))
    at *= seconds / max(at[-1], seconds)  # none arrives later than that
    weights = 1.0 / np.arange(1, max(variants, 1) + 1) ** zipf
    chosen = random.choice(len(weights), count, p=weights / weights.sum()) if variants else np.full(count, -1)
    lengths = np.exp(random.normal(0.0, SPREAD, (count, 2))) * (MEDIAN_PROMPT, MEDIAN_ANSWER)
    lengths = np.clip(lengths.astype(int), 4, longest)
    tokens = np.random.default_rng((seed, content))
    return [
        Offered(float(t), int(v), tuple(tokens.integers(3, vocabulary, p).tolist()), int(a))
        for t, v, (p, a) in zip(at, chosen, lengths, strict=True)
    ]


async def play(load: Sequence[Offered], ask: Ask, *, until: float | None = None) -> list[Timing]:
    """Send every request at its time, whether or not earlier ones are answered (an open loop).

    Args:
        until: seconds after the start when what still runs is given up, as the figures' window is over. None: never.
    """
    start = time.perf_counter()
    timings = [Timing(offered) for offered in load]
    tasks = [asyncio.create_task(_one(timing, ask, start)) for timing in timings]
    _, late = await asyncio.wait(tasks, timeout=until)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return timings


async def _one(timing: Timing, ask: Ask, start: float) -> None:
    await asyncio.sleep(max(0.0, timing.offered.at - (time.perf_counter() - start)))
    try:
        async with aclosing(ask(timing.offered)) as events:
            async for count in events:
                timing.tokens += [time.perf_counter() - start] * count
    except Exception as error:
        timing.error = f"{type(error).__name__}: {error}"


def summary(timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    """What came in the window: tokens per second, time to first token and gaps between tokens in milliseconds.

    Args:
        seconds: for how long requests arrived. The window is all of that but the first RAMP.
    """
    start, stop = RAMP * seconds, seconds
    gaps = [gap for t in timings for gap in t.gaps(start, stop)]
    begun = [t for t in timings if t.tokens and start <= t.tokens[0] <= stop]
    came = np.sort([at for t in timings for at in t.tokens])
    produced = int(((came >= start) & (came <= stop)).sum())
    due = [t for t in timings if t.offered.at <= stop]
    return {
        "requests": len(due),
        "failed": sum(bool(t.error) for t in due),
        "first_error": next((t.error for t in due if t.error), ""),
        "unfinished": sum(t.unfinished for t in due),
        "without_a_token": sum(t.unfinished and not t.tokens for t in due),
        "window_s": round(stop - start, 2),
        "tokens_per_s": round(produced / (stop - start), 1),
        "prompt_tokens_per_s": round(sum(len(t.offered.prompt) for t in begun) / (stop - start), 1),
        "decoding": round(sum(gaps) / (stop - start), 1),
        **_percentiles("ttft_ms", [t.ttft for t in begun]),
        **_percentiles("itl_ms", gaps),
        "longest_gap_ms": round(1e3 * max(gaps, default=0.0), 2),
        "tokens_by_half_second": np.histogram(came, np.arange(0.0, stop + 0.25, 0.5))[0].tolist(),
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    if not seconds:
        return {f"{name}_p50": None, f"{name}_p99": None}
    p50, p99 = np.percentile(seconds, [50, 99])
    return {f"{name}_p50": round(1e3 * float(p50), 2), f"{name}_p99": round(1e3 * float(p99), 2)}
