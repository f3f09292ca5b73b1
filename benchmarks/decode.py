"""Whole decode steps: all layers, attention, head, sampling, in one CUDA graph, next to the bytes that they must read.

    python benchmarks/decode.py [--shapes llama-2-7b llama-3.1-8b] [--variants 1 8 16 32 64] [--contexts 1024]
                                [--kinds row] [--rows-each 1] [--peers] [--peer-batches 1 16] [--peer-seconds 90]
                                [--seconds 400]

B variants are B rows of B variants, or with --rows-each so many rows of each; 0 variants are the base alone, at every
batch of --batches. Floor: base, each variant's delta and the KV cache, read once, over the bandwidth measured in this
run. `naive`: one bf16 model per variant, one after the other (as many steps of batch 1; how they would fit into memory
is left aside). With --peers: transformers with a static cache and torch.compile on the base, and PEFT's mixed batch of
LoRAs beside ours. A peer that fails, or takes longer than --peer-seconds to be ready, is said so and left out. One JSON
line per step in benchmarks/results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import gpu_timing
import peers_decode
import torch
from device_world import DecodeStep, World
from gpu_timing import Report
from synthetic import SHAPES, Kind

MOST_KV_BYTES = 45e9


@dataclass
class Run:
    """What all cases share."""

    report: Report
    name: str
    dtype: torch.dtype
    contexts: list[int]
    until: float

    @property
    def shape(self):
        return SHAPES[self.name]

    def over(self) -> bool:
        if time.monotonic() > self.until:
            print("the time was used up: some cases were left out", flush=True)
            return True
        return False


@dataclass(frozen=True)
class Peers:
    """At which batches others are measured, and how long one may take."""

    batches: Sequence[int]
    seconds: float

    def measured(self, run: Run, rows: int, call: Callable[[], float]) -> dict[int, float]:
        """Microseconds by rows; nothing, said aloud, where the peer did not get that far. It is others' code."""
        if run.over():
            return {}
        began = time.monotonic()
        try:
            with _limited(self.seconds):
                us = call()
        except Exception as error:
            print(f"PEER FAILED at {rows} rows: {type(error).__name__}: {str(error)[:500]}", flush=True)
            return {}
        finally:
            peers_decode.free()
        print(f"a peer at {rows} rows: {us:.1f} us, measured in {time.monotonic() - began:.1f} s", flush=True)
        return {rows: us}


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside when it takes longer; seen between two instructions of the interpreter."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(run: Run, world: World, kind: str, rows: int, variants: int, peers: dict[str, float]) -> dict[int, float]:
    """Microseconds by context."""
    found: dict[int, float] = {}
    for context in run.contexts:
        kv_bytes = world.kv_bytes(rows, context)
        if kv_bytes > MOST_KV_BYTES or run.over():
            continue
        step = DecodeStep(world, rows, variants, context)
        us = gpu_timing.graph_us([step], target_us=20000)
        if int(step.sampled.finite_S.min()) != 1:
            run.report.check(f"{run.name} {kind} {rows} rows: a row is not finite", 1.0, 0.0)
            continue
        nbytes = world.base_bytes + variants * world.delta_bytes + kv_bytes
        case = {"model": run.name, "kind": kind, "rows": rows, "variants": variants, "context": context}
        case |= {"kv_bytes": kv_bytes, "delta_bytes": world.delta_bytes, "base_bytes": world.base_bytes}
        run.report.row(case, us, nbytes=nbytes, peers_us={k: v for k, v in peers.items() if context == run.contexts[0]})
        found[context] = us
        del step
        gc.collect()
    return found


def base_alone(run: Run, batches: list[int], peers: Peers) -> dict[int, float]:
    """The base's own steps. Returns batch 1's microseconds by context."""
    theirs = {}
    for rows in batches:
        if rows in peers.batches:
            theirs |= peers.measured(
                run, rows, partial(peers_decode.transformers_us, run.shape, batch=rows, context=run.contexts[0])
            )
    world = World(run.shape, None, 0, run.dtype)
    one: dict[int, float] = {}
    for rows in batches:
        beside = {"transformers, compiled": theirs[rows]} if rows in theirs else {}
        found = measure(run, world, "base", rows, 0, beside)
        one = one or found
    return one


def variants_of(
    run: Run, kind: Kind, counts: list[int], naive_us: dict[int, float], peers: Peers, rows_each: int
) -> None:
    """`rows_each` rows of each of B variants. Those with one have peers."""
    world = World(run.shape, kind, max(counts), run.dtype)
    memory = torch.cuda.memory_allocated() if gpu_timing.device().type == "cuda" else 0
    run.report.write(
        {
            "case": "memory",
            "model": run.name,
            "kind": kind,
            "variants": world.variants,
            "allocated_bytes": memory,
            "base_and_deltas": sum(w.nbytes for w in world.weights.targets.values())
            + world.variants * world.layout.nbytes,
        }
    )
    for count in counts:
        if run.over():
            return
        beside = {}
        if rows_each == 1 and run.contexts[0] in naive_us:
            beside = {f"naive, {count} models": count * naive_us[run.contexts[0]]}
        if rows_each == 1 and kind == "lora" and count in peers.batches and count > 1:
            theirs = partial(peers_decode.peft_us, run.shape, batch=count, context=run.contexts[0])
            found = peers.measured(run, count, theirs)
            beside |= {"peft mixed batch": found[count]} if found else {}
        measure(run, world, kind, count * rows_each, count, beside)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["llama-2-7b", "llama-3.1-8b"])
    parser.add_argument("--variants", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--rows-each", type=int, default=1, help="rows of each variant")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="of the base alone")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 512, 4096], help="the first is the peers'")
    parser.add_argument("--kinds", nargs="+", choices=("row", "row_col", "lora", "auto"), default=["row"])
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--peer-seconds", type=float, default=90.0, help="of one peer at one batch, compiling included")
    parser.add_argument("--seconds", type=float, default=400.0, help="no case is begun after them")
    parser.add_argument("--dry-run", action="store_true", help="tiny, through the interpreter: tests the benchmark")
    arguments = parser.parse_args()
    dry = arguments.dry_run
    dtype = torch.float32 if dry else torch.bfloat16
    report = Report("decode", dry, gpu_timing.read_bandwidth())
    until = time.monotonic() + arguments.seconds
    for name in ["tiny"] if dry else arguments.shapes:
        run = Run(report, name, dtype, [24] if dry else arguments.contexts, until)
        peers = Peers(() if not arguments.peers else (1, 2) if dry else arguments.peer_batches, arguments.peer_seconds)
        naive_us = base_alone(run, [1] if dry else arguments.batches, peers)
        _free()
        for kind in arguments.kinds:
            variants_of(run, kind, [2] if dry else arguments.variants, naive_us, peers, arguments.rows_each)
            _free()
    return 1 if report.failed else 0


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
