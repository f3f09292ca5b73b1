"""The bare engine under offered load: tokens per second, time to first token, gaps between tokens.

    python benchmarks/engine.py [--shape llama-2-7b] [--variants 1 8 32 64] [--rates 4 8 16] [--seconds 20]

A base of random weights and one delta of random numbers, known under as many names as there are variants: every name
has its own bytes in the slab. Each count of variants runs at every rate, and once more with other variants being asked
for in the background all the time, so that deltas are loaded (and evicted) while the rest computes. The same requests
are played at each count. One JSON line per run in benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import engine_cases
import gpu_timing
import synthetic
from arrivals import Offered, make_load, play, summary

from bitdelta_core import Engine, GenerationRequest, SamplingParams

COLD_PERIOD_S = 0.2
"""Between two requests for variants that are not resident."""


def ask(engine: Engine, name: str) -> Any:
    """How one request of a load is put to the engine; variant i is called `<name>-<i>`."""
    numbers = itertools.count()

    async def stream(offered: Offered) -> AsyncIterator[int]:
        request = GenerationRequest(
            request_id=f"{name}-{next(numbers)}",
            prompt_token_ids=offered.prompt,
            params=SamplingParams(temperature=0, max_tokens=offered.answer, ignore_eos=True),
            delta=None if offered.variant < 0 else f"{name}-{offered.variant}",
        )
        async for event in engine.stream(request):
            yield len(event.token_ids)

    return stream


async def keep_loading(engine: Engine) -> None:
    """Ask for one token of a variant that nobody had before, again and again."""
    for i in itertools.count():
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        request = GenerationRequest(
            request_id=f"cold-{os.getpid()}-{i}", prompt_token_ids=(5,), params=params, delta=f"cold-{time.time_ns()}"
        )
        async for _ in engine.stream(request):
            pass
        await asyncio.sleep(COLD_PERIOD_S)


async def measure(engine: Engine, load: list[Offered], *, cold: bool) -> dict[str, Any]:
    """Play a load once, optionally while others load."""
    before = engine.stats()
    background = asyncio.create_task(keep_loading(engine)) if cold else None
    timings = await play(load, ask(engine, "variant"))
    if background is not None:
        background.cancel()
        with suppress(asyncio.CancelledError):
            await background
    after = engine.stats()
    return {
        **summary(timings),
        "delta_loads": after.delta_loads_total - before.delta_loads_total,
        "delta_evictions": after.delta_evictions_total - before.delta_evictions_total,
        "preemptions": after.preemptions_total - before.preemptions_total,
        "steps": after.steps_total - before.steps_total,
    }


def warm_up(engine: Engine, variants: int) -> None:
    """Load every variant that the load asks for, so that cold starts are only those that are meant."""
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    for i in range(variants):
        engine.generate([[5, 6, 7]], params, delta=f"variant-{i}")


def main() -> int:
    parser = engine_cases.engine_parser(__doc__)
    parser.add_argument("--variants", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rates", type=float, nargs="+", default=[8.0])
    parser.add_argument("--arrival", choices=("poisson", "gamma"), default="poisson")
    arguments = parser.parse_args()
    with engine_cases.workplace(arguments) as work:
        return run(arguments, work)


def run(arguments: argparse.Namespace, work: Path) -> int:
    shape = synthetic.SHAPES[arguments.shape]
    base, delta = engine_cases.on_disk(arguments.shape, arguments.kind, work)
    report = gpu_timing.Report("engine", arguments.dry_run, gpu_timing.read_bandwidth())
    begun = time.perf_counter()
    with Engine(base, engine_cases.engine_config(arguments), lambda sha256: nullcontext(delta)) as engine:
        print(f"started in {time.perf_counter() - begun:.1f} s\n{engine.memory.table()}", flush=True)
        failed = 0
        for variants in arguments.variants:
            warm_up(engine, variants)
            for rate, cold in itertools.product(arguments.rates, (False, True)):
                load = make_load(
                    seconds=arguments.seconds,
                    rate=rate,
                    variants=variants,
                    vocabulary=shape.vocabulary,
                    arrival=arguments.arrival,
                    longest=arguments.longest,
                )
                case = {"shape": arguments.shape, "kind": arguments.kind, "variants": variants, "rate": rate}
                case |= {"arrival": arguments.arrival, "cold_loads": cold}
                result = asyncio.run(measure(engine, load, cold=cold))
                failed += result["failed"]
                report.write({**case, **result})
                print("  ".join(f"{k}={v}" for k, v in {**case, **result}.items()), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
