"""What a streamed token costs every process on its way: CPU time, at several numbers of streams. No GPU.

    python benchmarks/serve_cost.py [--streams 4 24] [--messages 400 0] [--tokens 200]

A whole server of a tiny model; the streams begin together and run to their ends. `messages` is
`stream_messages_per_s`, 0 sends every token at once. One JSON line for each in benchmarks/results/serve_cost.jsonl.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from typing import Any

import engine_cases
import gpu_timing
import psutil
import serve_gpu
from arrivals import Offered

RESULTS = gpu_timing.RESULTS / "serve_cost.jsonl"
VARIANTS = 3
PROCESSES = {"replica": "ServeReplica.*ModelReplica", "ingress": "ServeReplica.*Ingress", "proxy": "ProxyActor"}


def cpu_seconds() -> dict[str, float]:
    """Of everything called so."""
    found = dict.fromkeys(PROCESSES, 0.0)
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        line, times = " ".join(process.info["cmdline"] or ()), process.info["cpu_times"]
        for name, pattern in PROCESSES.items():
            if times is not None and re.search(pattern, line):
                found[name] += times.user + times.system
    return found


def measured(url: str, base: str, streams: int, tokens: int) -> dict[str, Any]:
    load = [Offered(0.0, i % VARIANTS, (5,) * 20, tokens) for i in range(streams)]
    before, began = cpu_seconds(), time.perf_counter()
    result = asyncio.run(serve_gpu.over_http(url, base, load, 600.0))
    seconds, after = time.perf_counter() - began, cpu_seconds()
    assert not result["failed"], result["first_error"]
    cost = {f"{name}_ms": round(1e3 * (after[name] - before[name]) / (streams * tokens), 3) for name in PROCESSES}
    return {"streams": streams, "tokens_per_s": round(streams * tokens / seconds), **cost}


def main() -> int:
    parser = engine_cases.engine_parser(__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--messages", type=int, nargs="+", default=[400, 0])
    parser.add_argument("--tokens", type=int, default=200)
    arguments = parser.parse_args(["--shape", "tiny", *sys.argv[1:]])
    conditions = {**gpu_timing.conditions(), "cores": os.cpu_count()}
    with engine_cases.workplace(arguments) as work:
        base, delta = engine_cases.on_disk(arguments.shape, arguments.kind, work)
        here = work / f"cost-{os.getpid()}"
        serve_gpu.publish(serve_gpu.copies_of(delta, here / "copies", VARIANTS), here / "repository")
        options = serve_gpu.serve_options(engine_cases.engine_config(arguments, delta, VARIANTS))
        for messages in arguments.messages:
            os.environ["BITDELTA_STREAM_MESSAGES_PER_S"] = str(messages)
            with serve_gpu.server(base, here / "repository", here, options, 240.0) as url:
                measured(url, base.name, 6, 20)
                for streams in arguments.streams:
                    line = {"messages": messages, **measured(url, base.name, streams, arguments.tokens)}
                    print(line, flush=True)
                    with RESULTS.open("a") as out:
                        out.write(json.dumps({**conditions, **line}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
