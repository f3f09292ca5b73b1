"""From nothing to the first token of a base and of a variant, and what is in memory once so many variants are resident.

    python benchmarks/startup.py [--shape llama-2-7b] [--variants 32] [--kv-gb 17.2]

Files are in the page cache (they have just been written, or read by the run before); `compiled` counts the kernels that
the start had to compile, 0 when an earlier process on this machine has left them in Triton's cache. The slab holds the
variants and nothing more, so that what is in use can be compared with base + variants + KV cache.

Several of these at once, each with other --graph-sizes and little memory, compile in parallel what later runs need
(--dry-run --settle --variants 1 --kv-gb 1 --graph-sizes 16 24 32).

JSON lines `startup` and `memory` in benchmarks/results/startup.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import engine_cases


def main() -> int:
    parser = engine_cases.engine_parser(__doc__)
    parser.add_argument("--variants", type=int, default=32)
    parser.add_argument(
        "--settle", action="store_true", help="meet every size of prompt, so that others find it compiled"
    )
    arguments = parser.parse_args()
    with engine_cases.workplace(arguments) as work:
        return run(arguments, work)


def run(arguments: argparse.Namespace, work: Path) -> int:
    base, delta = engine_cases.on_disk(arguments.shape, arguments.kind, work)
    config = engine_cases.engine_config(arguments, delta, arguments.variants, spare=0)
    names = [f"variant-{i}" for i in range(arguments.variants)]
    with engine_cases.started(base, config, lambda sha256: nullcontext(delta), names[0]) as (engine, start):
        loading = engine_cases.load_all(engine, names)  # and a step with a row of each
        memory = engine_cases.memory_record(
            engine, arguments.variants, engine_cases.extent_bytes(arguments.shape, delta, config)
        )
        resident = len(engine.stats().resident)
        if arguments.settle:
            engine_cases.timed("settled", lambda: engine_cases.settle(engine, names, 1024))
    print(f"{resident} of {arguments.variants} variants resident, loaded in {loading:.1f} s", flush=True)
    print(engine_cases.line(memory), flush=True)
    report = engine_cases.report("startup", arguments)
    for record in (start, {**memory, "load_all_s": round(loading, 2)}):
        report.write({"shape": arguments.shape, "kind": arguments.kind, **record})
    return 0 if resident == arguments.variants else 1


if __name__ == "__main__":
    sys.exit(main())
