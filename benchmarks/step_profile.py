"""Where a decode step's time goes: its kernels, as the profiler times them inside the replayed CUDA graph.

    python benchmarks/step_profile.py [--shape llama-2-7b] [--kind row] [--rows 1 16 64] [--variants 0 16]

Kernels start before their predecessors have ended, so that their durations add up to more than the step. What each
costs is `own`: from the end of the kernel that ended before it to its own end. One JSON line per kernel and step in
benchmarks/results/step_profile.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import defaultdict
from dataclasses import dataclass

import gpu_timing
import torch
from device_world import DecodeStep, World
from gpu_timing import Report
from synthetic import SHAPES

REPLAYS = 5
LINEARS = ("q, k, v", "o", "gate, up", "down")
"""In the order of a layer, where each is one kernel"""


@dataclass
class Share:
    """Of one kernel in a step."""

    count: float = 0
    us: float = 0.0
    own: float = 0.0


def shares(step: DecodeStep) -> dict[str, Share]:
    """By kernel name, per step."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    found: dict[str, Share] = defaultdict(Share)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    before, linears = 0.0, 0
    for event in sorted(events, key=lambda event: event.time_range.end):
        name, end = event.name[:60], event.time_range.end
        if name == "embed_kernel":
            linears = 0
        if name == "flat_kernel":
            name, linears = f"flat_kernel, {LINEARS[linears % 4]} or head", linears + 1
        share = found[name]
        share.count += 1 / REPLAYS
        share.us += event.device_time / REPLAYS
        share.own += min(end - before, event.device_time) / REPLAYS
        before = end
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-2-7b")
    parser.add_argument("--kind", choices=("row", "row_col", "lora"), default="row")
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--variants", type=int, nargs="+", default=[16], help="0: the base alone")
    parser.add_argument("--context", type=int, default=1024)
    arguments = parser.parse_args()
    assert torch.cuda.is_available(), "no CUDA device"
    report = Report("step_profile", False, gpu_timing.read_bandwidth())
    for count in arguments.variants:
        world = World(SHAPES[arguments.shape], arguments.kind if count else None, count, torch.bfloat16)
        for rows in arguments.rows:
            if count <= rows:
                show(report, arguments, world, rows, count)
        del world
        gc.collect()
        torch.cuda.empty_cache()
    return 0


def show(report: Report, arguments: argparse.Namespace, world: World, rows: int, variants: int) -> None:
    step = DecodeStep(world, rows, variants, arguments.context)
    us = gpu_timing.graph_us([step], target_us=20000)
    kernels = shares(step)
    case = {"model": arguments.shape, "rows": rows, "variants": variants, "context": arguments.context}
    nbytes = world.base_bytes + variants * world.delta_bytes + world.kv_bytes(rows, arguments.context)
    report.row(case, us, nbytes=nbytes)
    for name, share in sorted(kernels.items(), key=lambda item: -item[1].own):
        each = f"{share.count:6.0f} x {share.own / share.count:7.2f} us own, {share.us / share.count:7.2f} us long"
        print(f"    {name:<60} {each} = {share.own:8.1f}", flush=True)
        own = {"us": round(share.us, 1), "own_us": round(share.own, 1)}
        report.write({**case, "kernel": name, "count": round(share.count), **own})


if __name__ == "__main__":
    sys.exit(main())
