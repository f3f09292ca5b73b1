"""The same load over HTTP, through the Ray Serve application, and on the bare engine: what serving costs.

    python benchmarks/serve_gpu.py [--shape llama-2-7b] [--variants 32] [--rate 8] [--seconds 15]
                                   [--systems serve engine direct]

`bitdelta serve` runs as its users run it, once as it comes and once with `--direct-streaming`; every request streams
from `/v1/completions` as server-sent events. The engine alone is asked the same (`engine.py`). Deltas are copies of
one, told apart by their provenance: each has its own sha256, name and place in the slab, and the repository stores
their weights once. Before the load, every variant is asked for, and every size of prompt. One JSON line per system in
benchmarks/results/serve_gpu.jsonl, written when it has been measured; a system that does not come up is said so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import engine as bare
import engine_cases
import httpx
import psutil
import synthetic
import torch
from arrivals import Offered, make_load, play, summary

from bitdelta_core.delta.format import open_delta
from bitdelta_core.engine.config import EngineConfig
from deployments.metadata import metadata_of
from storage import Catalog, open_store

OWNER = "bench"
STOP_S = 45.0
GPU_CPUS = 4
"""Of a replica beside a GPU: as many threads bring the signs of one delta into order. Two deltas are loaded at a time,
and where all their threads are more than there are cores, each operation waits for the slowest."""
PAUSES = ("was compiled while serving", "captured a step")
"""What a server's log says of steps that everybody waited for"""
SYSTEMS = {"serve": "ray serve", "engine": "engine", "direct": "ray serve, direct streaming"}
ROOT = Path(__file__).resolve().parent.parent


class NotUp(RuntimeError):
    """The server did not come up, or could not be ended."""


def copies_of(delta: Path, out: Path, count: int) -> list[Path]:
    """Directories with the same weights (hard links) and another provenance each."""
    config = json.loads((delta / "delta_config.json").read_text())
    made = []
    for i in range(count):
        path = out / f"variant-{i}"
        path.mkdir(parents=True)
        for file in delta.iterdir():
            if file.name != "delta_config.json":
                os.link(file, path / file.name)
        (path / "delta_config.json").write_text(json.dumps({**config, "provenance": {"copy": i}}))
        made.append(path)
    return made


def publish(deltas: list[Path], repository: Path) -> None:
    """Each directory as the first version of `bench/<its name>`; several at a time, since each is hashed in whole."""
    catalog = Catalog(open_store(repository.as_uri()))

    def one(path: Path) -> None:
        config = open_delta(path).config
        catalog.publish(
            path, f"{OWNER}/{path.name}", base_sha256=config.base_sha256, base_model="", metadata=metadata_of(config)
        )

    one(deltas[0])  # the others find its weights there
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, deltas[1:]))


@contextmanager
def server(base: Path, repository: Path, work: Path, options: list[str], startup_s: float) -> Iterator[str]:
    """`bitdelta serve` of this checkout; yields its URL once it is healthy.

    Raises:
        NotUp: with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deployments.cli", "serve", "--base", str(base), "--repo", str(repository)]
    command += ["--cache-dir", str(work / "cache"), "--port", str(port), "--verbose", *options]
    log = work / "server.log"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": path}, start_new_session=True
        )
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log, startup_s)
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ray's processes are sessions of their own: what they leave would keep the GPU's memory."""
    with suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs([psutil.Process(process.pid), *started], timeout=STOP_S)
        if alive:
            print(f"{len(alive)} processes of the server did not end in {STOP_S:.0f} s: killed", flush=True)
        for one in alive:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def _wait_until_healthy(process: subprocess.Popen, url: str, log: Path, startup_s: float) -> None:
    deadline = time.monotonic() + startup_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise NotUp(f"the server did not come up; its log ends:\n{log.read_text()[-6000:]}")


async def over_http(url: str, base: str, load: list[Offered], seconds: float, *, until: float | None = None) -> dict:
    """Play a load as clients would: one stream per request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:

        async def ask(offered: Offered) -> AsyncGenerator[int]:
            body = {
                "model": base if offered.variant < 0 else f"{OWNER}/variant-{offered.variant}",
                "prompt": list(offered.prompt),
                "max_tokens": offered.answer,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
            seen = 0
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise RuntimeError(str(event["error"]))
                    count = event["usage"]["completion_tokens"]
                    if count > seen:
                        yield count - seen
                    seen = count

        return summary(await play(load, ask, until=until), seconds)


def first_requests(variants: int, longest: int) -> list[list[Offered]]:
    """What comes before the load: every variant, then every size of prompt alone and beside others."""
    every = [Offered(0.0, i, (5, 6, 7), 2) for i in range(variants)]
    sizes = [n for n in engine_cases.PROMPT_SIZES if n <= longest]
    apart = [Offered(0.25 * at, 0, (7,) * n, 4) for at, n in enumerate(sizes)]
    together = [Offered(0.0, i % variants, (8,) * n, 64) for i, n in enumerate(sizes * 3)]
    return [every, apart, together]


def main() -> int:
    parser = engine_cases.engine_parser(__doc__)
    engine_cases.add_load(parser)
    parser.add_argument("--variants", type=int, default=32)
    parser.add_argument("--rate", type=float, default=8.0)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--startup-seconds", type=float, default=240.0, help="a server that takes longer is given up")
    parser.add_argument("--budget", type=float, default=None, help="seconds after which no further system is started")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what it has started
    if arguments.systems != ["engine"]:  # a package that the server wants is missed before minutes go into a model
        subprocess.run([sys.executable, "-c", "import deployments.app, deployments.config"], cwd=ROOT, check=True)
    with engine_cases.workplace(arguments) as work:
        return run(arguments, work)


def run(arguments: argparse.Namespace, work: Path) -> int:
    base, delta = engine_cases.on_disk(arguments.shape, arguments.kind, work)
    here = work / f"serve-{os.getpid()}"
    deltas = copies_of(delta, here / "copies", arguments.variants)
    engine_cases.timed("variants published", lambda: publish(deltas, here / "repository"))
    report = engine_cases.report("serve_gpu", arguments)
    config = engine_cases.engine_config(arguments, delta, arguments.variants)
    failed = 0
    for system in arguments.systems:
        if arguments.budget is not None and engine_cases.process_age() > arguments.budget:
            print(f"the time was used up: {system} was left out", flush=True)
            continue
        engine_cases.wait_for_memory()
        try:
            result = one_system(system, arguments, base, deltas, config, here)
        except NotUp as error:
            print(f"{system}: {error}", flush=True)
            failed += 1
            continue
        failed += result["failed"]
        case = {"shape": arguments.shape, "kind": arguments.kind, "variants": arguments.variants}
        record = {**case, "rate": arguments.rate, "system": SYSTEMS[system], **result}
        report.write(record)
        print(engine_cases.line(record), flush=True)
    return 1 if failed else 0


def one_system(
    system: str, arguments: argparse.Namespace, base: Path, deltas: list[Path], config: EngineConfig, here: Path
) -> dict:
    """Start it, ask for everything once, play the load."""
    load = make_load(
        seconds=arguments.seconds,
        rate=arguments.rate,
        variants=arguments.variants,
        vocabulary=synthetic.SHAPES[arguments.shape].vocabulary,
        longest=arguments.longest,
    )
    if system == "engine":
        return _alone(base, deltas, arguments, config, load)
    options = serve_options(config)
    if system == "direct":
        options += ["--direct-streaming", "--host", "0.0.0.0"]
    began = time.perf_counter()
    with server(base, here / "repository", here, options, arguments.startup_seconds) as url:
        up_s = time.perf_counter() - began
        problems = []
        for first in first_requests(arguments.variants, arguments.longest):
            found = asyncio.run(over_http(url, base.name, first, 1.0))
            problems += [found["first_error"]] if found["failed"] else []
        print(f"{system}: up in {up_s:.1f} s, ready for the load after {time.perf_counter() - began:.1f} s", flush=True)
        log = here / "server.log"
        said = len(log.read_text())
        result = asyncio.run(over_http(url, base.name, load, arguments.seconds, until=arguments.seconds))
        pauses = [line[:300] for line in log.read_text()[said:].splitlines() if any(p in line for p in PAUSES)]
    known = {"first_problems": problems, "up_s": round(up_s, 1), "pauses": pauses}
    return {**result, "failed": result["failed"] + len(problems), **known}


def serve_options(config: EngineConfig) -> list[str]:
    """The engine's configuration as flags."""
    options = ["--max-num-seqs", str(config.max_num_seqs), "--max-model-len", str(config.max_model_len)]
    options += ["--slab-bytes", str(config.slab_bytes), "--loader", config.loader]
    options += [part for path in config.cuda_graph_deltas for part in ("--cuda-graph-deltas", path)]
    if config.kv_cache_bytes is not None:
        options += ["--kv-cache-bytes", str(config.kv_cache_bytes)]
    if torch.cuda.is_available():
        options += ["--num-cpus", str(min(GPU_CPUS, os.cpu_count() or 1))]
    return options


def _alone(
    base: Path, deltas: list[Path], arguments: argparse.Namespace, config: EngineConfig, load: list[Offered]
) -> dict:
    named = {f"variant-{i}": path for i, path in enumerate(deltas)}
    source = lambda name: nullcontext(named[name])  # noqa: E731
    with engine_cases.started(base, config, source, "variant-0") as (engine, _):
        bare.warm_up(engine, len(deltas), arguments.longest)
        return asyncio.run(bare.measure(engine, load, seconds=arguments.seconds))


if __name__ == "__main__":
    sys.exit(main())
