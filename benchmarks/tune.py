"""Finds the fastest configurations of the decode-sized linears on this GPU and files them where the kernels look.

    python benchmarks/tune.py [--shapes llama-2-7b llama-3.1-8b] [--rows 1 4 16 64] [--workers 12] [--seconds 480]

Per linear and number of rows: base tiles alone, sign products alone, then the best few of both in one launch, and the
two in two launches. Compiling is most of the work, so processes of their own compile ahead into Triton's cache. Writes
`kernels/delta_linear/configs/<device>.json`, and every timing to benchmarks/results/tune.jsonl.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product

import gpu_timing
import torch
from gpu_timing import Report
from kernel_worlds import targets_of
from linear_cases import LIMIT, SIGNS, LinearCase, LinearRun, pool_of, weights_of
from synthetic import SHAPES

from kernels import configs
from kernels.delta_linear.choice import Config, candidates, key, settings
from kernels.device import Target

BEST = 3
OPS = ("qkv", "o", "gate_up", "down", "head")


@dataclass(frozen=True)
class Job:
    """Configurations of one case, to be compiled."""

    case: LinearCase
    configs: tuple[Config, ...]


def compile_ahead(pool: ProcessPoolExecutor | None, jobs: Iterable[Job]) -> None:
    """One task per configuration, so that all workers are busy to the end."""
    if pool is None:
        return
    tasks = [Job(job.case, (config,)) for job in jobs for config in job.configs]
    for failed in pool.map(_compile, tasks, chunksize=1):
        if failed:
            print(failed, flush=True)


def _compile(job: Job) -> str:
    """In a worker: compiling depends on shapes alone, so one variant is enough. What does not compile is not timed."""
    try:
        case = replace(
            job.case, variants=min(1, job.case.variants), mix="base" if job.case.mix == "base" else "identical"
        )
        target = case.target
        weight = torch.empty(target.outputs, target.inputs, dtype=torch.bfloat16, device="cuda").normal_()
        run = LinearRun(case, pool_of(target, case.parts, 1, torch.bfloat16), [weight])
        for config in job.configs:
            run.calls(config)[0]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"does not run: {job.configs[0]}: {str(error)[:200]}"
    return ""


class Search:
    """One linear at one number of rows."""

    def __init__(self, name: str, op: str, target: Target, rows: int) -> None:
        self.name, self.op, self.target, self.rows = name, op, target, rows
        self.signs = LinearCase(target, rows, rows, "distinct", SIGNS)
        self.base = LinearCase(target, rows, 0, "base", SIGNS)

    def first(self) -> list[Job]:
        """Base tiles alone, and two launches: cuBLAS does not vary, so these rank the sign products."""
        flat = [c for c in candidates(self.target, self.rows, self.base.kinds) if c.impl == "flat"]
        signs = [c for c in candidates(self.target, self.rows, self.signs.kinds) if c.impl == "signs"]
        return [Job(self.base, tuple(flat)), Job(self.signs, tuple(signs))]

    def second(self, flat: list[Config], signs: list[Config]) -> Job:
        """The best of both in one launch."""
        tile = ("impl", "split", "outputs", "inner", "stages")
        joined = [replace(s, **{name: getattr(f, name) for name in tile}) for f, s in product(flat, signs)]
        return Job(self.signs, tuple(dict.fromkeys(joined)))


def timed(report: Report, search: Search, run: LinearRun, found: Iterable[Config]) -> dict[Config, float]:
    """Microseconds of the configurations that run and are right."""
    times: dict[Config, float] = {}
    for config in found:
        try:
            if run.error(config) > LIMIT:
                print(f"WRONG {search.name} {search.op} {search.rows}: {config}", flush=True)
                continue
            times[config] = gpu_timing.graph_us(run.calls(config), replays=5, target_us=1500)
        except Exception as error:
            print(f"does not run: {config}: {str(error)[:200]}", flush=True)
            continue
        case = {"model": search.name, "op": search.op, "rows": search.rows, "mix": run.case.mix}
        report.write({**case, "us": times[config], "bytes": run.nbytes, **asdict(config)})
    return times


def best(times: dict[Config, float], count: int = BEST) -> list[Config]:
    return sorted(times, key=lambda config: times[config])[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["llama-2-7b", "llama-3.1-8b"])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS[:4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--dry-run", action="store_true", help="tiny, one configuration: tests the search")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    if arguments.dry_run:
        return run(arguments, None)
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        return run(arguments, pool)


def run(arguments: argparse.Namespace, pool: ProcessPoolExecutor | None) -> int:
    began, dry = time.monotonic(), arguments.dry_run
    report = Report("tune", dry, gpu_timing.read_bandwidth())
    dtype = torch.float32 if dry else torch.bfloat16
    shapes, rows = (["tiny"], [2]) if dry else (arguments.shapes, arguments.rows)
    found: dict[str, dict] = {}
    for name, op in product(shapes, arguments.ops):
        target = targets_of(SHAPES[name])[op]
        weights, made = weights_of(target, dtype), pool_of(target, SIGNS, max(rows), dtype)
        searches = [Search(name, op, target, n) for n in rows]
        compile_ahead(pool, [job for search in searches for job in search.first()])
        for search in searches:
            if time.monotonic() - began > arguments.seconds:
                print("the time was used up: some cases were left out", flush=True)
                break
            found |= _search(report, pool, search, made, weights, dry)
        del weights, made
        torch.cuda.empty_cache()
        if not dry:
            _file(found)
    return 0


def _search(
    report: Report, pool: ProcessPoolExecutor | None, search: Search, made, weights, dry: bool
) -> dict[str, dict]:
    base_run, sign_run = LinearRun(search.base, made, weights), LinearRun(search.signs, made, weights)
    base_job, sign_job = search.first()
    if dry:
        base_job, sign_job = (replace(job, configs=(Config("unpack"),)) for job in (base_job, sign_job))
    cublas = gpu_timing.graph_us(base_run.cublas())
    base_times = timed(report, search, base_run, base_job.configs)
    sign_times = timed(report, search, sign_run, sign_job.configs)
    both = search.second(best(base_times), best(sign_times))
    if not dry:
        compile_ahead(pool, [both])
        sign_times |= timed(report, search, sign_run, both.configs)
    chosen: dict[str, dict] = {}
    for run_, times in ((base_run, base_times), (sign_run, sign_times)):
        if not times:
            continue
        (winner,) = best(times, 1)
        if run_ is base_run and cublas < times[winner]:
            winner = Config("signs")
        chosen[key(search.target, search.rows, run_.case.kinds)] = settings(winner)
        floor = run_.nbytes / report.read_bytes_per_s * 1e6
        us = times.get(winner, cublas)
        case = f"{search.name} {search.op} rows={search.rows} {run_.case.mix}"
        print(
            f"{case:<40} {us:8.1f} us  floor {floor:8.1f}  {floor / us:.2f}  cublas {cublas:.1f}  {winner}", flush=True
        )
    return chosen


def _file(found: dict[str, dict]) -> None:
    """Beside what is filed already."""
    path = configs.path("delta_linear", torch.cuda.get_device_name())
    path.parent.mkdir(exist_ok=True)
    filed = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(sorted({**filed, **found}.items())), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
