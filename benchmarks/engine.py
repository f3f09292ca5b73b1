"""The bare engine under offered load: tokens per second, time to first token, gaps between tokens.

    python benchmarks/engine.py [--shape llama-2-7b] [--variants 8 32 64] [--rates 8] [--seconds 15]

A base of random weights and one delta of random numbers, known under as many names as there are variants: every name
has its own bytes in the slab. Each count of variants runs at every rate twice. Beside the load a token is asked for
every EVERY_S seconds, first of a variant that is resident, then each time of another that nobody had before, so that
deltas are loaded (and evicted) while the rest computes: `itl_p99_ratio` is the 99th percentile of gaps then over that
of the first run. The same lengths arrive at the same times in both, with other tokens, so that none is found in the
prefix cache. A run lasts as long as requests arrive; the rest is given up.

One JSON line per run in benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engine_cases
import synthetic
import torch
from arrivals import Ask, Offered, make_load, play, summary
from engine_cases import WATCH

from bitdelta_core import Engine, GenerationRequest, SamplingParams, TokenEvent

EVERY_S = 0.8
"""From one request beside the load to the next, if the first is answered by then."""
CONTENT = itertools.count(1)
"""Numbers of loads: no two have the same prompts."""


def ask(engine: Engine, name: str) -> Ask:
    """How one request of a load is put to the engine; variant i is called `<name>-<i>`."""
    numbers, run = itertools.count(), time.time_ns()

    async def stream(offered: Offered) -> AsyncGenerator[int]:
        request = GenerationRequest(
            request_id=f"{name}-{run}-{next(numbers)}",
            prompt_token_ids=offered.prompt,
            params=SamplingParams(temperature=0, max_tokens=offered.answer, ignore_eos=True),
            delta=None if offered.variant < 0 else f"{name}-{offered.variant}",
        )
        async with aclosing(events_of(engine, request)) as events:
            async for event in events:
                yield len(event.token_ids)

    return stream


def events_of(engine: Engine, request: GenerationRequest) -> AsyncGenerator[TokenEvent]:
    """Closing it aborts the request."""
    events = engine.stream(request)
    assert isinstance(events, AsyncGenerator)
    return events


@dataclass
class Beside:
    """Requests for one token, one after the other: of the variants that `name` says."""

    name: Callable[[int], str]
    seconds: list[float] = field(default_factory=list)
    """From asking to the token, of each"""

    async def keep_asking(self, engine: Engine) -> None:
        """Until it is cancelled. Raises what the engine does."""
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        for i in itertools.count():
            began = time.perf_counter()
            request = GenerationRequest(
                request_id=f"beside-{time.time_ns()}", prompt_token_ids=(5,), params=params, delta=self.name(i)
            )
            async with aclosing(events_of(engine, request)) as events:
                async for _ in events:
                    pass
            self.seconds.append(time.perf_counter() - began)
            await asyncio.sleep(max(0.0, EVERY_S - self.seconds[-1]))


def resident(i: int) -> str:
    return "variant-0"


def cold(i: int) -> str:
    """A name that nobody had before."""
    return f"cold-{os.getpid()}-{time.time_ns()}-{i}"


async def measure(
    engine: Engine, load: list[Offered], *, seconds: float, beside: Beside | None = None
) -> dict[str, Any]:
    """Play a load once, alone or with others beside it."""
    before, seen = engine.stats(), WATCH.counts()
    background = asyncio.create_task(beside.keep_asking(engine)) if beside else None
    timings = await play(load, ask(engine, "variant"), until=seconds)
    found = {**summary(timings, seconds), "beside_error": ""}
    if background is not None:
        if background.done():
            found |= {"beside_error": str(background.exception()), "failed": found["failed"] + 1}
        background.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await background
    after = engine.stats()
    took = sorted(beside.seconds) if beside else []
    return {
        **found,
        "beside_requests": len(took),
        "beside_s_p50": round(took[len(took) // 2], 3) if took else None,
        "delta_loads": after.delta_loads_total - before.delta_loads_total,
        "delta_evictions": after.delta_evictions_total - before.delta_evictions_total,
        "preemptions": after.preemptions_total - before.preemptions_total,
        "steps": after.steps_total - before.steps_total,
        **WATCH.since(seen),
    }


def warm_up(engine: Engine, variants: int, longest: int) -> None:
    """Load every variant that the load asks for, and compile what it needs: cold starts are those that are meant."""
    names = [f"variant-{i}" for i in range(variants)]
    loading = engine_cases.load_all(engine, names)
    began, before = time.perf_counter(), WATCH.counts()
    engine_cases.settle(engine, names, longest)
    settling = time.perf_counter() - began
    print(
        f"{variants} variants: loaded in {loading:.1f} s, settled in {settling:.1f} s, {WATCH.since(before)}",
        flush=True,
    )


def main() -> int:
    parser = engine_cases.engine_parser(__doc__)
    engine_cases.add_load(parser)
    parser.add_argument("--variants", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--rates", type=float, nargs="+", default=[8.0])
    parser.add_argument("--arrival", choices=("poisson", "gamma"), default="poisson")
    parser.add_argument(
        "--switch-interval-ms", type=float, default=None, help="how long a thread may keep the interpreter; Python: 5"
    )
    parser.add_argument("--budget", type=float, default=None, help="seconds after which no further run is begun")
    arguments = parser.parse_args()
    if arguments.switch_interval_ms is not None:
        sys.setswitchinterval(arguments.switch_interval_ms / 1e3)
    with engine_cases.workplace(arguments) as work:
        return run(arguments, work)


def run(arguments: argparse.Namespace, work: Path) -> int:
    base, delta = engine_cases.on_disk(arguments.shape, arguments.kind, work)
    most = max(arguments.variants)
    config = engine_cases.engine_config(arguments, delta, most)
    with engine_cases.started(base, config, lambda sha256: nullcontext(delta), "variant-0") as (engine, start):
        report = engine_cases.report("engine", arguments)
        report.write({"shape": arguments.shape, "kind": arguments.kind, **start})
        failed = 0
        for variants in sorted(arguments.variants):
            warm_up(engine, variants, arguments.longest)
            for rate in arguments.rates:
                if arguments.budget is not None and engine_cases.process_age() > arguments.budget:
                    print(f"the time was used up: {variants} variants at {rate}/s were left out", flush=True)
                    continue
                failed += pair(report, engine, arguments, variants, rate)
    return 1 if failed else 0


def pair(report: Any, engine: Engine, arguments: argparse.Namespace, variants: int, rate: float) -> int:
    """The same load without and with deltas loading. Returns how many requests failed."""
    case = {"shape": arguments.shape, "kind": arguments.kind, "variants": variants, "rate": rate}
    case |= {"arrival": arguments.arrival, "switch_interval_ms": 1e3 * sys.getswitchinterval()}
    case |= {"threads": torch.get_num_threads()}
    failed, quiet_ms = 0, None
    for name in (resident, cold):
        load = make_load(
            seconds=arguments.seconds,
            rate=rate,
            variants=variants,
            vocabulary=synthetic.SHAPES[arguments.shape].vocabulary,
            arrival=arguments.arrival,
            longest=arguments.longest,
            content=next(CONTENT),
        )
        result = asyncio.run(measure(engine, load, seconds=arguments.seconds, beside=Beside(name)))
        failed += result["failed"]
        record = {**case, "cold_loads": name is cold, **result}
        if name is cold and quiet_ms and result["itl_ms_p99"]:
            record["itl_p99_ratio"] = round(result["itl_ms_p99"] / quiet_ms, 3)
        quiet_ms = result["itl_ms_p99"]
        report.write(record)
        print(engine_cases.line(record), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
