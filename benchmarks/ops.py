"""Every device kernel next to its floor and its peers, at the sizes of real models. One JSON line per case.

    python benchmarks/ops.py [--sections linear ...] [--shapes llama-2-7b llama-3.1-8b] [--seconds 240] [--dry-run]

Sections: `linear` (decode-sized, signs), `rows` (many rows of few variants), `low_rank`, `factors` (of bytes, beside
signs), `prefill`, `attention`, `stages` (norm, SiLU, rope, embedding, planes), `sampling`, `compact` (few kept inputs
beside signs). Every case is checked against float64 before it is timed; one that fails is reported and makes the exit
code 1. Sections stop when the time is used up, and say so.

(Not called kernels.py: beside the other scripts that name would hide the package.)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import gpu_timing
import stage_cases
import torch
from compact_cases import compact_linears
from factor_cases import factors
from gpu_timing import Report
from kernel_worlds import Parts, targets_of
from linear_cases import LIMIT, LinearCase, LinearRun, pool_of, weights_of
from peers import CONFIGS, Published, naive, published_error
from prefill_cases import BF16_LIMIT, attention, prefill
from synthetic import SHAPES, Shape

from kernels.device import Target

LINEARS = ("qkv", "o", "gate_up", "down")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
MANY = ((64, 8), (64, 1), (64, 4), (64, 16), (32, 8), (16, 4), (256, 8), (256, 64))
"""(rows, variants)"""


@dataclass
class Clock:
    """How much of the time is left."""

    seconds: float
    began: float

    def spent(self) -> bool:
        return time.monotonic() - self.began > self.seconds


@dataclass
class Session:
    """What the sections share."""

    report: Report
    clock: Clock
    dtype: torch.dtype
    dry: bool
    file: bool = False
    """Settings that were found fastest are filed"""

    def batches(self) -> tuple[int, ...]:
        return (2,) if self.dry else BATCHES


def linear(session: Session, name: str, shape: Shape) -> None:
    """B rows of B variants: ours, the base product alone, the published kernel, one model per row."""
    for op, target in _targets(shape):
        weights = weights_of(target, session.dtype)
        made = pool_of(target, Parts(planes=1), max(session.batches()), session.dtype)
        for rows in session.batches():
            if session.clock.spent():
                return
            run = LinearRun(LinearCase(target, rows, rows), made, weights)
            with_peers = rows in (1, 8, 16, 64) or session.dry
            _time_linear(session, {"model": name, "op": op, "rows": rows, "variants": rows}, run, with_peers)
        base = LinearRun(LinearCase(target, session.batches()[0], 0, "base"), made, weights)
        _time_linear(session, {"model": name, "op": op, "rows": base.case.rows, "variants": 0}, base, False)


def rows(session: Session, name: str, shape: Shape) -> None:
    """Many rows of few variants, and other layouts of signs."""
    for op, target in _targets(shape):
        weights = weights_of(target, session.dtype)
        made = pool_of(target, Parts(planes=1), 64, session.dtype)
        for count, variants in ((4, 2),) if session.dry else MANY:
            if session.clock.spent():
                return
            run = LinearRun(LinearCase(target, count, variants, "uniform"), made, weights)
            case = {"model": name, "op": op, "rows": count, "variants": variants, "mix": "uniform"}
            _time_linear(session, case, run, False)
        for parts in (Parts(planes=1, columns=True), Parts(planes=2), Parts(planes=4)):
            made = pool_of(target, parts, 16, session.dtype)
            run = LinearRun(
                LinearCase(target, 4 if session.dry else 16, 4 if session.dry else 16, parts=parts), made, weights
            )
            case = {"model": name, "op": op, "rows": 16, "variants": 16}
            case |= {"planes": parts.planes, "columns": parts.columns}
            _time_linear(session, case, run, False)


def low_rank(session: Session, name: str, shape: Shape) -> None:
    """LoRA in place of signs."""
    for op, target in _targets(shape, ("qkv", "down")):
        weights = weights_of(target, session.dtype)
        for rank in (16, 64):
            made = pool_of(target, Parts(rank=rank), 16, session.dtype)
            for count in (2,) if session.dry else (1, 16):
                if session.clock.spent():
                    return
                run = LinearRun(LinearCase(target, count, count, parts=Parts(rank=rank)), made, weights)
                case = {"model": name, "op": op, "rows": count, "variants": count, "rank": rank}
                _time_linear(session, case, run, False)


def _time_linear(session: Session, case: dict, run: LinearRun, with_peers: bool) -> None:
    config = run.chosen
    if not session.report.check(str(case), run.error(config), LIMIT):
        return
    ours = gpu_timing.graph_us(run.calls(config))
    peers = {"cublas base": gpu_timing.graph_us(run.cublas())}
    if with_peers:
        peers |= _published_us(session, run)
        peers["naive"] = _naive_us(run)
    session.report.row({"kernel": "linear", **case, "impl": config.impl}, ours, nbytes=run.nbytes, peers_us=peers)


def _published_us(session: Session, run: LinearRun) -> dict[str, float]:
    """The best of its configurations that are right."""
    case, device = run.case, run.x_TK.device
    out = torch.empty(case.rows, case.target.outputs, dtype=run.bulk.dtype, device=device)
    delta = torch.empty_like(out)
    scale = torch.rand(case.rows, 1, device=device).to(run.bulk.dtype)
    words = torch.randint(
        -(2**31),
        2**31 - 1,
        (case.rows, case.target.inputs // 32, case.target.outputs),
        dtype=torch.int32,
        device=device,
    )
    times: list[float] = []
    for config in CONFIGS[-1:] if session.dry else CONFIGS:
        error = published_error(config, run.bulk.dtype, device)
        if session.report.check(f"published {config}", error, BF16_LIMIT):
            calls = [Published(weight, words, scale, config) for weight in run.weights]
            times.append(gpu_timing.graph_us([lambda c=c: c(run.x_TK, out, delta) for c in calls], target_us=1500))
    return {"published": min(times)} if times else {}


def _naive_us(run: LinearRun) -> float:
    """A full matrix per row; as many as fit, in turn."""
    rows, copies = run.case.rows, [w[None] for w in run.weights]
    stacked = torch.cat(copies).repeat(-(-rows // len(copies)), 1, 1)[:rows] if rows <= 16 else None
    out = torch.empty(rows, run.case.target.outputs, dtype=run.bulk.dtype, device=run.x_TK.device)
    if stacked is not None:
        return gpu_timing.graph_us([lambda: naive(run.x_TK, stacked, out)])
    one = run.x_TK[:1]
    calls = [lambda w=w: torch.mm(one, w.T, out=out[:1]) for w in run.weights]
    return rows * gpu_timing.graph_us(calls)


def _targets(shape: Shape, names: tuple[str, ...] = LINEARS) -> Iterator[tuple[str, Target]]:
    found = targets_of(shape)
    for name in names:
        yield name, replace(found[name], index=0)


SECTIONS: dict[str, Callable[[Session, str, Shape], None]] = {
    "linear": linear,
    "rows": rows,
    "low_rank": low_rank,
    "factors": factors,
    "prefill": prefill,
    "attention": attention,
    "stages": stage_cases.stages,
    "sampling": stage_cases.sampling,
    "compact": compact_linears,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=sorted(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["llama-2-7b", "llama-3.1-8b"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all sections together")
    parser.add_argument("--dry-run", action="store_true", help="tiny, through the interpreter: tests the benchmark")
    parser.add_argument("--file", action="store_true", help="compact, factors: file the fastest settings")
    arguments = parser.parse_args()
    torch.manual_seed(time.time_ns() % 2**31)
    dry = arguments.dry_run
    dtype = torch.float32 if dry else getattr(torch, arguments.dtype)
    report = Report("ops", dry, gpu_timing.read_bandwidth())
    print(f"read bandwidth {report.read_bytes_per_s / 1e12:.2f} TB/s", flush=True)
    session = Session(report, Clock(arguments.seconds, time.monotonic()), dtype, dry, arguments.file and not dry)
    for section in arguments.sections:
        for name in ["tiny"] if dry else arguments.shapes:
            print(f"\n== {section}, {name}", flush=True)
            SECTIONS[section](session, name, SHAPES[name])
            torch.cuda.empty_cache()
    if session.clock.spent():
        print("the time was used up: some cases were left out", flush=True)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
