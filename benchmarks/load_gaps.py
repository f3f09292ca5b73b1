"""How long a thread that does many small operations waits while deltas are read into host buffers beside it.

    python benchmarks/load_gaps.py [--shape llama-2-7b] [--layers 8] [--seconds 10] [--rounds 3]

The thread stands for an engine's: a step is 300 operations on a few numbers, and its time is a gap between tokens.
Three ways in turn: nothing is loaded, a thread of the process loads one delta after the other, a loader process does.
`own_cpu_ms` is what a load costs this process's loading thread. No GPU; what a GPU's engine waits is in `engine.py`.
JSON lines on the standard output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import synthetic
import torch

from bitdelta_core.engine.accelerator import Plain
from bitdelta_core.engine.delta_loader import DeltaLoader, ProcessLoader, ThreadLoader
from bitdelta_core.engine.host_buffers import HostBuffers
from bitdelta_core.engine.layouts import LayoutRule
from bitdelta_core.engine.loader_processes import LoaderProcesses
from bitdelta_core.engine.loader_wire import Setup
from bitdelta_core.engine.passing import run_in_passing_thread
from bitdelta_core.models.config import ModelConfig
from bitdelta_core.models.parameters import Parameters

OPERATIONS = 300
WAYS = ("nothing", "thread", "process")


@dataclass
class Seen:
    steps: list[float] = field(default_factory=list)
    opens: list[float] = field(default_factory=list)
    fills: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Seconds of a loading thread of this process, by its own clock, per load"""

    def record(self, way: str) -> dict[str, Any]:
        steps = sorted(self.steps)
        found = {"beside": way, "steps": len(steps)}
        return found | {f"p{p}_ms": round(1e3 * steps[len(steps) * p // 100], 3) for p in (50, 90, 99)} | self.loads()

    def loads(self) -> dict[str, Any]:
        medians = {"open_ms": self.opens, "fill_ms": self.fills, "own_cpu_ms": self.cpu}
        found = {name: round(1e3 * statistics.median(seconds), 1) for name, seconds in medians.items() if seconds}
        return {"loads": len(self.fills), **found}


def steps(until: float, seen: Seen) -> None:
    values = torch.ones(64)
    while (start := time.perf_counter()) < until:
        for _ in range(OPERATIONS):
            values.add_(1.0)
        seen.steps.append(time.perf_counter() - start)


def load(loader: DeltaLoader, hosts: HostBuffers, delta: Path, seen: Seen) -> None:
    start, cpu = time.perf_counter(), time.thread_time()
    loadable = loader.open(delta)
    opened = time.perf_counter()
    host = hosts.take(loadable.layout.nbytes)
    took = time.perf_counter()
    loadable.fill(host)
    seen.fills.append(time.perf_counter() - took)
    seen.opens.append(opened - start)
    seen.cpu.append(time.thread_time() - cpu)
    hosts.give_back(host)


def turn(seconds: float, seen: Seen, work: Callable[[], None] | None) -> None:
    """Steps for so many seconds, loads beside them."""
    until = time.perf_counter() + seconds

    def loads() -> None:
        while work is not None and time.perf_counter() < until:
            run_in_passing_thread(work)

    beside = threading.Thread(target=loads)
    beside.start()
    steps(until, seen)
    beside.join()


def loaders(model: ModelConfig, count: int = 1) -> tuple[dict[str, tuple[DeltaLoader, HostBuffers]], LoaderProcesses]:
    """Of deltas that need no base. count: of processes."""
    parameters = Parameters.of(model)
    shapes = {name: (place.rows, place.columns) for name, place in parameters.linears.items()}
    rule = LayoutRule(decoder="device", model=model, dtype=torch.bfloat16, device="cuda")
    nothing: Any = SimpleNamespace(linear_weight=None, vectors_V=None)
    setup = Setup(
        base="", base_fingerprint="", base_sha256=synthetic.NO_BASE, base_shapes=shapes, rule=rule,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    processes, plain = LoaderProcesses(setup, count), _Kept(torch.device("cpu"))
    thread = ThreadLoader(rule, synthetic.NO_BASE, shapes, nothing)
    beside = HostBuffers(plain, keep=1, make_memory=processes.make_memory)
    return {"thread": (thread, HostBuffers(plain, keep=1)), "process": (ProcessLoader(processes), beside)}, processes


class _Kept(Plain):
    """Buffers are used again, as pinned ones are."""

    keeps_host_buffers = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=synthetic.SHAPES, default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = replace(synthetic.SHAPES[arguments.shape], layers=arguments.layers).model()
    seen = {way: Seen() for way in WAYS}
    with tempfile.TemporaryDirectory() as work:
        delta = synthetic.write_delta(model, Path(work) / "delta", "row")
        ways, processes = loaders(model)
        for way, parts in ways.items():
            alone = Seen()
            for _ in range(3):
                load(*parts, delta, alone)
            print(json.dumps({"alone": way, **alone.loads()}))
        for way in WAYS * arguments.rounds:
            parts = ways.get(way)
            beside = None if parts is None else (lambda parts=parts, way=way: load(*parts, delta, seen[way]))
            turn(arguments.seconds, seen[way], beside)
        processes.close()
    for way, found in seen.items():
        print(json.dumps(found.record(way)))


if __name__ == "__main__":
    main()
