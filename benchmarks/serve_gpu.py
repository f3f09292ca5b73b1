"""The same load over HTTP, through the Ray Serve application, and on the bare engine: what serving costs.

    python benchmarks/serve_gpu.py [--shape llama-2-7b] [--variants 32] [--rate 8] [--seconds 20]

`bitdelta serve` runs as its users run it, once as it comes and once with `--direct-streaming`; every request streams
from `/v1/completions` as server-sent events. Then the engine alone is asked the same (`engine.py`). Deltas are copies
of one, told apart by their provenance: each has its own sha256, name and place in the slab, and the repository stores
their weights once. One JSON line per system in benchmarks/results/serve_gpu.jsonl.
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
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import engine as bare
import engine_cases
import gpu_timing
import httpx
import synthetic
from arrivals import Offered, make_load, play, summary

from bitdelta_core import Engine
from bitdelta_core.delta.format import open_delta
from deployments.metadata import metadata_of
from storage import Catalog, open_store

STARTUP_S = 240.0
OWNER = "bench"


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
    """Each directory as the first version of `bench/<its name>`."""
    catalog = Catalog(open_store(repository.as_uri()))
    for path in deltas:
        config = open_delta(path).config
        catalog.publish(
            path, f"{OWNER}/{path.name}", base_sha256=config.base_sha256, base_model="", metadata=metadata_of(config)
        )


@contextmanager
def server(base: Path, repository: Path, work: Path, options: list[str]) -> Iterator[str]:
    """`bitdelta serve`; yields its URL once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deployments.cli", "serve", "--base", str(base), "--repo", str(repository)]
    command += ["--cache-dir", str(work / "cache"), "--port", str(port), *options]
    log = work / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=90)


def _wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    raise SystemExit(f"the server did not come up; its log ends:\n{log.read_text()[-4000:]}")


async def over_http(url: str, base: str, load: list[Offered]) -> dict:
    """Play a load as clients would: one stream per request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def ask(offered: Offered) -> AsyncIterator[int]:
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

        return summary(await play(load, ask))


def main() -> int:
    parser = engine_cases.engine_parser(__doc__)
    parser.add_argument("--variants", type=int, default=32)
    parser.add_argument("--rate", type=float, default=8.0)
    arguments = parser.parse_args()
    with engine_cases.workplace(arguments) as work:
        return run(arguments, work)


def run(arguments: argparse.Namespace, work: Path) -> int:
    shape = synthetic.SHAPES[arguments.shape]
    base, delta = engine_cases.on_disk(arguments.shape, arguments.kind, work)
    deltas = copies_of(delta, work / "copies", arguments.variants)
    publish(deltas, work / "repository")
    report = gpu_timing.Report("serve_gpu", arguments.dry_run, gpu_timing.read_bandwidth())
    load = make_load(
        seconds=arguments.seconds,
        rate=arguments.rate,
        variants=arguments.variants,
        vocabulary=shape.vocabulary,
        longest=arguments.longest,
    )
    first = [Offered(0.1 * i, i, (5, 6, 7), 2) for i in range(arguments.variants)]
    options = ["--max-num-seqs", str(arguments.max_num_seqs)]
    if (slab := engine_cases.slab_bytes(arguments)) is not None:
        options += ["--slab-bytes", str(slab)]
    direct = [*options, "--direct-streaming", "--host", "0.0.0.0"]
    results = {}
    for system, given in (("ray serve", options), ("ray serve, direct streaming", direct)):
        with server(base, work / "repository", work, given) as url:
            asyncio.run(over_http(url, base.name, first))
            results[system] = asyncio.run(over_http(url, base.name, load))
    results["engine"] = _alone(base, deltas, arguments, load)
    for system, result in results.items():
        case = {"shape": arguments.shape, "kind": arguments.kind, "variants": arguments.variants}
        case |= {"rate": arguments.rate, "system": system}
        report.write({**case, **result})
        print("  ".join(f"{k}={v}" for k, v in {**case, **result}.items()), flush=True)
    return 1 if any(result["failed"] for result in results.values()) else 0


def _alone(base: Path, deltas: list[Path], arguments: argparse.Namespace, load: list[Offered]) -> dict:
    named = {f"variant-{i}": path for i, path in enumerate(deltas)}
    with Engine(base, engine_cases.engine_config(arguments), lambda name: nullcontext(named[name])) as engine:
        bare.warm_up(engine, len(deltas))
        return asyncio.run(bare.measure(engine, load, cold=False))


if __name__ == "__main__":
    sys.exit(main())
