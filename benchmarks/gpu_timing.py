"""How the GPU benchmarks measure: replays of CUDA graphs over buffers larger than the cache, next to the GPU's floors.

Every figure is a median over replays, in microseconds per call, and stands in a JSON line with its conditions, the
bytes that the call must move, and the fraction of the floor that it reaches. The floor's bandwidth is measured in the
same run: reading 1 GiB, the best of a few launch shapes.

Without a GPU, `--dry-run` runs every case once at a tiny size, through Triton's interpreter: it tests the benchmark.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from revision import commit

RESULTS = Path(__file__).parent / "results"
CACHE_BYTES = 220 << 20
"""Inputs are rotated over at least this much, several times the L2 cache of any GPU meant."""
Call = Callable[[], object]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def copies(nbytes: int) -> int:
    """How many sets of an input of `nbytes` keep it out of the cache."""
    return 1 if device().type == "cpu" else max(2, -(-CACHE_BYTES // max(nbytes, 1)))


def graph_us(calls: Sequence[Call], *, replays: int = 7, target_us: float = 3000.0) -> float:
    """Median microseconds of one call, `calls` in turn inside one CUDA graph. On a CPU: of one pass, by the clock."""
    if device().type == "cpu":
        return 1e6 * _once(calls) / len(calls)
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    estimate = 1e6 * (time.perf_counter() - start) / len(calls)
    rounds = max(1, round(target_us / max(estimate, 1.0) / len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return statistics.median(_replay_us(graph) for _ in range(replays)) / (rounds * len(calls))


def stream_us(call: Call, *, repeats: int = 5) -> float:
    """Median microseconds of a call launched from Python, launches included."""
    if device().type == "cpu":
        return 1e6 * _once([call])
    call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return statistics.median(times)


def _once(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(stop)


@triton.jit
def _read_kernel(SRC, DST, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * UNROLL
    total = tl.zeros((BLOCK,), tl.int32)
    for u in tl.static_range(UNROLL):
        total = total ^ tl.load(SRC + (first + u) * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    folded = tl.sum(total, 0)
    if folded == 123456789:  # keeps the loads alive
        tl.store(DST, folded)


def read_bandwidth() -> float:
    """Bytes per second of reading 1 GiB: what floors are made of."""
    if device().type == "cpu":
        return 1e9
    found = _read_bandwidth()
    torch.cuda.empty_cache()  # an engine, here or in another process, plans with what is free
    return found


def _read_bandwidth() -> float:
    source = torch.ones(1 << 28, dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def reader(block: int, unroll: int, warps: int) -> Call:
        grid = (source.numel() // (block * unroll),)
        return lambda: _read_kernel[grid](source, sink, block, unroll, num_warps=warps)

    shapes = ((2048, 4, 4), (4096, 4, 8), (2048, 8, 4), (1024, 8, 4))
    return source.nbytes / min(graph_us([reader(*s)]) for s in shapes) * 1e6


def copy_bandwidth(pinned_bytes: int = 1 << 28) -> float:
    """Bytes per second from pinned host memory to the device, one large copy."""
    if device().type == "cpu":
        return 1e9
    host = torch.empty(pinned_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(pinned_bytes, dtype=torch.uint8, device="cuda")
    return pinned_bytes / stream_us(lambda: target.copy_(host, non_blocking=True), repeats=9) * 1e6


def conditions() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


@dataclass
class Report:
    """Rows of one benchmark: a JSON line each, and a line on the screen."""

    name: str
    dry: bool
    read_bytes_per_s: float
    context: dict[str, Any] = field(default_factory=conditions)
    failed: int = 0

    def row(self, case: dict[str, Any], us: float, *, nbytes: float, peers_us: dict[str, float] | None = None) -> float:
        """Note that a call which must move `nbytes` took `us`. Returns the fraction of the floor."""
        floor = nbytes / self.read_bytes_per_s * 1e6
        peers = {name: round(value, 2) for name, value in (peers_us or {}).items()}
        record = {
            **case,
            "us": round(us, 2),
            "bytes": int(nbytes),
            "floor_us": round(floor, 2),
            "fraction": round(floor / us, 4),
            "peers_us": peers,
        }
        text = "  ".join(f"{k}={v}" for k, v in case.items())
        beside = "  ".join(f"{name} {value:.1f} ({value / us:.2f}x)" for name, value in peers.items())
        print(f"{text:<70} {us:>9.1f} us  floor {floor:>8.1f}  {floor / us:>5.2f}   {beside}", flush=True)
        self.write(record)
        return floor / us

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; a dry run leaves no trace."""
        if self.dry:
            return
        RESULTS.mkdir(parents=True, exist_ok=True)
        with (RESULTS / f"{self.name}.jsonl").open("a") as file:
            file.write(
                json.dumps({**self.context, "read_gb_per_s": round(self.read_bytes_per_s / 1e9), **record}) + "\n"
            )

    def check(self, what: str, error: float, limit: float) -> bool:
        """The correctness gate of a case: it is not measured when this is False."""
        passed = error <= limit  # NaN does not pass
        if not passed:
            self.failed += 1
            print(f"WRONG {what}: error {error:.3g} above {limit:.3g}", flush=True)
            self.write({"case": what, "wrong": error, "limit": limit})
        return passed


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected|| in float64."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())
