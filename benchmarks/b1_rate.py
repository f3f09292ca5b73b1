"""How fast the binary tensor core of this GPU is: from one product to the next that adds to it, and at best.

    python benchmarks/b1_rate.py

Each warp of every multiprocessor multiplies in a number of chains: a product of a chain adds to the one before. With
few chains and warps the time is the latency, with many it is the rate. One JSON line each in
benchmarks/results/b1_rate.jsonl. A product is one `mma.m16n8k256`, of which the kernels start two at a time.
"""

from __future__ import annotations

import itertools
import sys

import gpu_timing
import torch
import triton
import triton.language as tl
from gpu_timing import Report

from kernels.delta_linear.triton_signs import multiply

TURNS, UNROLLED = 256, 16
WARPS, CHAINS = (4, 8, 16), (2, 4, 8, 16)


@triton.jit
def _chains(SEED, OUT, turns, CHAINS: tl.constexpr, UNROLLED: tl.constexpr, WARPS: tl.constexpr):
    """CHAINS: twice as many as pairs of accumulators."""
    lane = tl.arange(0, WARPS * 128)[None, :]
    signs = tl.load(SEED + lane)
    low, high = (), ()
    for _ in tl.static_range(CHAINS // 2):
        low, high = low + (tl.zeros_like(signs),), high + (tl.zeros_like(signs),)  # noqa: RUF005
    for _ in range(turns):
        for _ in tl.static_range(UNROLLED):
            first, second = multiply(signs, signs, low[0], high[0])
            low, high = low[1:] + (first,), high[1:] + (second,)  # noqa: RUF005
    total = low[0] + high[0]
    for i in tl.static_range(1, CHAINS // 2):
        total += low[i] + high[i]
    tl.store(OUT + tl.program_id(0) * (WARPS * 128) + lane, total)


def main() -> int:
    assert torch.cuda.is_available(), "no CUDA device"
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    report = Report("b1_rate", False, gpu_timing.read_bandwidth())
    for warps, chains in itertools.product(WARPS, CHAINS):
        seed = torch.randint(-(2**31), 2**31 - 1, (warps * 128,), dtype=torch.int32, device="cuda")
        out = torch.empty(programs, warps * 128, dtype=torch.int32, device="cuda")

        def us(turns: int, seed=seed, out=out, warps=warps, chains=chains) -> float:
            grid = (programs,)
            return gpu_timing.graph_us(
                [lambda: _chains[grid](seed, out, turns, chains, UNROLLED, warps, num_warps=warps)]
            )

        ns = 1e3 * (us(3 * TURNS) - us(TURNS)) / (2 * TURNS * UNROLLED * 2)
        of_core = ns / (warps // 4)
        print(f"{warps:3} warps {chains:3} chains {ns:7.1f} ns a product of a warp, {of_core:6.2f} of a tensor core")
        report.write({"warps": warps, "chains": chains, "ns": round(ns, 2), "core_ns": round(of_core, 3)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
