"""Finds the fastest configurations of the decode-sized linears on this GPU and files them where the kernels look.

    python benchmarks/tune.py [--shapes llama-2-7b llama-3.1-8b] [--rows 1 4 16 64] [--workers 12] [--seconds 480]

Per linear and number of rows: base tiles alone; the rule's choice and every setting of sign products with its base
tiles, in one launch; then the best few of both and the rule's, all with all, and those sign products in a launch after
cuBLAS's. The fastest of everything timed is filed in `kernels/delta_linear/configs/<device>.json`; every timing is
written to benchmarks/results/tune.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product

import gpu_timing
import torch
import tuning
from gpu_timing import Report
from kernel_worlds import Bulk, targets_of
from linear_cases import LIMIT, SIGNS, LinearCase, LinearRun, pool_of, weights_of
from synthetic import SHAPES
from tuning import best

from kernels.delta_linear.choice import Config, candidates, fitting, key, settings
from kernels.device import Target

BEST = 2
WELL_BEHIND = 0.94
"""cuBLAS is chosen below so much of our time: it ends the chain of early starts, which is worth about that."""
OPS = ("qkv", "o", "gate_up", "down", "head")
BASE_TILE = ("impl", "outputs", "inner", "stages")
"""What a configuration says of the base's part; the rest is about signs."""
Times = Mapping[Config, float]


def joined(tile: Config, signs: Config, rows: int) -> Config:
    """The base tiles of one and the sign products of the other, as far as both fit."""
    return fitting(replace(signs, **{name: getattr(tile, name) for name in BASE_TILE}), rows)


def compile_one(case: LinearCase, config: Config) -> None:
    """Compiling depends on shapes alone, so one variant is enough."""
    mix = "base" if case.mix == "base" else "identical"
    case = replace(case, variants=min(1, case.variants), mix=mix)
    weight = torch.empty(case.target.outputs, case.target.inputs, dtype=torch.bfloat16, device="cuda").normal_()
    LinearRun(case, pool_of(case.target, case.parts, 1, torch.bfloat16), [weight]).calls(config)[0]()


class Search:
    """One linear at one number of rows."""

    def __init__(self, name: str, op: str, target: Target, rows: int, *, dry: bool = False) -> None:
        self.name, self.op, self.target, self.rows, self.dry = name, op, target, rows, dry
        self.signs = LinearCase(target, rows, rows, "distinct", SIGNS)
        self.base = LinearCase(target, rows, 0, "base", SIGNS)

    def rule(self, case: LinearCase) -> Config:
        return Config("unpack") if self.dry else candidates(self.target, self.rows, case.kinds)[0]

    def first(self, case: LinearCase) -> list[Config]:
        """What is timed before anything is known; for signs the rule's choice is among them."""
        if self.dry:
            return [Config("unpack")]
        found = candidates(self.target, self.rows, case.kinds)
        flat = [c for c in found if c.impl == "flat"]
        if case is self.base:
            return flat
        ranked = [c for c in flat if c == joined(flat[0], c, self.rows)]
        return [found[0], *(ranked or found[1:])]

    def second(self, base: Times, signs: Times) -> list[Config]:
        """The best base tiles and the rule's with the best sign products and the rule's; these after cuBLAS too."""
        if self.dry:
            return []
        chosen = [self.rule(self.signs), *best(signs, BEST)]
        tiles = [c for c in (*chosen, *best(base, BEST)) if c.impl == "flat"]
        found = [joined(t, s, self.rows) for t, s in product(tiles, chosen)]
        found += [replace(s, impl="signs") for s in chosen]
        return [c for c in dict.fromkeys(found) if c not in signs]


class Timer:
    """Times one search's configurations."""

    def __init__(self, report: Report, search: Search, made: Bulk, weights: list[torch.Tensor]) -> None:
        self.report, self.search = report, search
        self.base, self.signs = (LinearRun(case, made, weights) for case in (search.base, search.signs))

    def __call__(self, run: LinearRun, found: Iterable[Config]) -> dict[Config, float]:
        case = {"model": self.search.name, "op": self.search.op, "rows": self.search.rows, "mix": run.case.mix}
        return tuning.timed(self.report, case, run, found, limit=LIMIT, nbytes=run.nbytes)

    def show(self, run: LinearRun, winner: Config, us: float, rule_us: float, cublas_us: float) -> None:
        floor = run.nbytes / self.report.read_bytes_per_s * 1e6
        case = f"{self.search.name} {self.search.op} rows={self.search.rows} {run.case.mix}"
        beside = f"rule {rule_us:.1f}  cublas base {cublas_us:.1f}"
        print(f"{case:<40} {us:8.1f} us  floor {floor:8.1f}  {floor / us:.2f}  {beside}  {winner}", flush=True)


def searched(pool: ProcessPoolExecutor | None, search: Search, timer: Timer) -> tuning.Filed:
    """The fastest of everything timed, for the base alone and for signs."""
    cublas = gpu_timing.graph_us(timer.base.cublas())
    base = timer(timer.base, search.first(search.base))
    signs = timer(timer.signs, search.first(search.signs))
    more = search.second(base, signs)
    tuning.compile_ahead(pool, compile_one, [(search.signs, config) for config in more])
    signs |= timer(timer.signs, more)
    chosen: tuning.Filed = {}
    for run, times in ((timer.base, base), (timer.signs, signs)):
        rule_us = times.get(search.rule(run.case), cublas if run is timer.base else float("nan"))
        if run is timer.base and cublas < WELL_BEHIND * min(times.values(), default=float("inf")):
            times = {Config("signs"): cublas}
        for winner in best(times, 1):
            chosen[key(search.target, search.rows, run.case.kinds)] = settings(winner)
            timer.show(run, winner, times[winner], rule_us, cublas)
    return chosen


def run(arguments: argparse.Namespace, pool: ProcessPoolExecutor | None) -> int:
    began, dry = time.monotonic(), arguments.dry_run
    report = Report("tune", dry, gpu_timing.read_bandwidth())
    dtype = torch.float32 if dry else torch.bfloat16
    shapes, rows = (["tiny"], [2]) if dry else (arguments.shapes, arguments.rows)
    found: tuning.Filed = {}
    for name, op in product(shapes, arguments.ops):
        target = targets_of(SHAPES[name])[op]
        weights, made = weights_of(target, dtype), pool_of(target, SIGNS, max(rows), dtype)
        searches = [Search(name, op, target, n, dry=dry) for n in rows]
        cases = [(search, case) for search in searches for case in (search.base, search.signs)]
        tuning.compile_ahead(pool, compile_one, [(case, c) for search, case in cases for c in search.first(case)])
        for search in searches:
            if time.monotonic() - began > arguments.seconds:
                print("the time was used up: some cases were left out", flush=True)
                break
            found |= searched(pool, search, Timer(report, search, made, weights))
        del weights, made
        torch.cuda.empty_cache()
        if not dry:
            tuning.file("delta_linear", found)
    return 1 if report.failed else 0


def main() -> int:
    parser = tuning.parser(__doc__, rows=[1, 4, 16, 64])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS[:4])
    parser.add_argument("--seconds", type=float, default=480.0)
    arguments = parser.parse_args()
    with tuning.compilers(arguments.workers, arguments.dry_run) as pool:
        return run(arguments, pool)


if __name__ == "__main__":
    sys.exit(main())
