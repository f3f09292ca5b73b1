"""What the benchmarks of whole engines share: options, a checkpoint and a delta of random numbers, the config, and what
a start took in seconds and bytes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import gpu_timing
import synthetic
import torch
from watch import Watch, process_age

from bitdelta_core import Engine, EngineConfig, SamplingParams
from bitdelta_core.delta.format import open_delta
from bitdelta_core.engine.config import LoaderName
from bitdelta_core.engine.sources import DeltaSource
from bitdelta_core.models.variant import VariantLayout

KINDS: tuple[synthetic.Kind, ...] = ("row", "row_col", "lora", "auto")
SPARE = 8
"""Deltas that have room in the slab beside a load's own, so that one can be loaded while all of those are pinned."""
PROMPT_SIZES = (5, 16, 24, 40, 64, 100, 128, 200, 256, 300, 400, 512, 700, 1000)
"""Tokens: whatever a prompt's size decides is met before a load."""
FIRST_PROMPT = 128
"""Tokens of the first request after a start."""
LITTLE_BYTES = 4e9
"""What contexts of processes hold, and more"""
WATCH = Watch()
IMPORTS_S = process_age()
"""What this process had taken when everything was imported."""


def base_parser(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark that needs a checkpoint."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=sorted(synthetic.SHAPES), default="llama-2-7b")
    made.add_argument("--work", type=Path, default=None, help="keeps the checkpoint there between runs")
    made.add_argument("--dry-run", action="store_true", help="write no results")
    return made


def engine_parser(description: str | None) -> argparse.ArgumentParser:
    """Of a benchmark that starts an engine; its variants are its own."""
    made = base_parser(description)
    made.add_argument("--kind", choices=KINDS, default="row")
    made.add_argument("--max-num-seqs", type=int, default=64)
    made.add_argument("--max-model-len", type=int, default=None, help="None: the model's own, at most 4096")
    made.add_argument("--slab-gb", type=float, default=None, help=f"None: room for the variants and {SPARE} more")
    made.add_argument("--loader", choices=get_args(LoaderName), default="auto")
    made.add_argument("--kv-gb", type=float, default=None, help="None: what is left")
    made.add_argument("--graph-sizes", type=int, nargs="+", default=None, help="None: the engine's own")
    return made


def add_load(parser: argparse.ArgumentParser) -> None:
    """Options of a benchmark that plays a load."""
    parser.add_argument("--seconds", type=float, default=15.0, help="of arrivals; the first third is not counted")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a prompt, and of an answer, at most")


@contextmanager
def workplace(arguments: argparse.Namespace) -> Iterator[Path]:
    """`--work`, or a directory for this run."""
    if arguments.work is not None:
        yield arguments.work
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def on_disk(shape: str, kind: synthetic.Kind, work: Path) -> tuple[Path, Path]:
    """A base and a delta, made unless they lie there."""
    base, delta = work / shape, work / f"{shape}-{kind}"
    if not base.exists():
        timed(f"base {base.name} written", lambda: synthetic.write_base(synthetic.SHAPES[shape], base))
    if not delta.exists():
        timed(f"delta {delta.name} written", lambda: synthetic.write_delta(base, delta, kind))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # another process may be about to plan with what is free
    return base, delta


def timed(what: str, work: Callable[[], object]) -> None:
    """Say how long it took."""
    began = time.perf_counter()
    work()
    print(f"{what} in {time.perf_counter() - began:.1f} s", flush=True)


def wait_for_memory(patience_s: float = 30.0) -> None:
    """Until the device holds little: a server that has just ended gives its memory back a moment later."""
    deadline = time.monotonic() + patience_s
    while torch.cuda.is_available() and time.monotonic() < deadline:
        free, total = torch.cuda.mem_get_info()
        if total - free < LITTLE_BYTES:
            return
        time.sleep(0.2)


def extent_bytes(shape: str, delta: Path, config: EngineConfig) -> int:
    """Of one variant in the slab."""
    read, model = open_delta(delta).config, synthetic.SHAPES[shape].model()
    if config.torch_device.type == "cpu":
        return VariantLayout.plan(read, model, config.torch_dtype, "cpu").nbytes
    from bitdelta_core.models.device.layout import DeviceLayout

    return DeviceLayout.plan(read, model, config.torch_dtype).nbytes


def engine_config(arguments: argparse.Namespace, delta: Path, variants: int, *, spare: int = SPARE) -> EngineConfig:
    """With room for so many variants and a few more, and steps for such variants captured at the start."""
    slab = None if arguments.slab_gb is None else int(arguments.slab_gb * 1e9)
    if slab is None:
        slab = (variants + spare) * -(-extent_bytes(arguments.shape, delta, EngineConfig()) // 256) * 256
    return EngineConfig(
        max_num_seqs=arguments.max_num_seqs,
        max_model_len=arguments.max_model_len or min(4096, synthetic.SHAPES[arguments.shape].context),
        slab_bytes=slab,
        loader=arguments.loader,
        kv_cache_bytes=None if arguments.kv_gb is None else int(arguments.kv_gb * 1e9),
        cuda_graph_sizes=None if arguments.graph_sizes is None else tuple(arguments.graph_sizes),
        cuda_graph_deltas=(str(delta),),
    )


@contextmanager
def started(
    base: Path, config: EngineConfig, source: DeltaSource, first: str
) -> Iterator[tuple[Engine, dict[str, Any]]]:
    """An engine, and how long it took from nothing to the first token, of the base and of the variant `first`.

    With the page cache warm (the files have just been written) and `compiled` 0 this is a restart; otherwise it took
    the compiler's time too.
    """
    before, began = WATCH.counts(), time.perf_counter()
    with Engine(base, config, source) as engine:
        start = time.perf_counter() - began
        base_s, variant_s = (_first_token_s(engine, delta) for delta in (None, first))
        seconds = {name.replace(" ", "_").replace("-", "_") + "_s": s for name, s in engine.startup_seconds.items()}
        record = {
            "case": "startup",
            **{name: round(s, 3) for name, s in seconds.items()},
            "start_s": round(start, 2),
            "first_token_s": round(base_s, 3),
            "first_token_of_a_variant_s": round(variant_s, 3),
            "engine_to_first_token_s": round(start + base_s, 2),
            "imports_s": round(IMPORTS_S, 2),
            **WATCH.since(before),
        }
        print(f"{engine.memory.table()}\n{line(record)}", flush=True)
        yield engine, record


def _first_token_s(engine: Engine, delta: str | None) -> float:
    prompt = [5 + i % 200 for i in range(min(FIRST_PROMPT, engine.context_len() // 2))]
    began = time.perf_counter()
    engine.generate([prompt], SamplingParams(temperature=0, max_tokens=1, ignore_eos=True), delta=delta)
    return time.perf_counter() - began


def memory_record(engine: Engine, variants: int, delta_bytes: int) -> dict[str, Any]:
    """What is in use on the device beside base, slab and KV cache, next to what so many variants must take.

    `rest_bytes` is everything else that the driver counts: context and libraries, working memory, graphs, what the
    allocator holds. Room in the slab beyond the variants is not counted as theirs.
    """
    plan = engine.memory
    needed = plan.fixed.base_bytes + variants * delta_bytes + plan.kv_bytes
    free, total = torch.cuda.mem_get_info() if plan.device.type == "cuda" else (0, 0)
    rest = max(0, total - free - plan.fixed.base_bytes - plan.slab_bytes - plan.kv_bytes)
    return {
        "case": "memory",
        "variants": variants,
        "delta_bytes": delta_bytes,
        "base_bytes": plan.fixed.base_bytes,
        "slab_bytes": plan.slab_bytes,
        "kv_bytes": plan.kv_bytes,
        "kv_tokens": plan.kv_tokens,
        "work_bytes": plan.fixed.work_bytes,
        "graph_bytes": plan.fixed.graph_bytes,
        "used_bytes": total - free,
        "needed_bytes": needed,
        "rest_bytes": rest,
        "rest_of_needed": round(rest / needed, 4),
    }


def load_all(engine: Engine, names: list[str]) -> float:
    """Bring variants into the slab, as many at a time as the engine loads. Seconds."""
    began = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    engine.generate([[5, 6, 7]] * len(names), params, delta=names)
    return time.perf_counter() - began


def settle(engine: Engine, names: list[str], longest: int) -> None:
    """Meet every size of prompt, alone and beside others, so that what is compiled for it is there."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    sizes = [n for n in PROMPT_SIZES if n <= min(longest, engine.context_len() - 4)]
    for size in sizes:
        engine.generate([[7] * size], params, delta=names[0])
    several = [size for size in sizes if size <= 300]
    for some in (several, several[::-1], several[::2]):
        engine.generate([[8] * size for size in some], params, delta=[names[i % len(names)] for i in range(len(some))])
    engine.generate([[9] * size for size in sizes], params)


def line(record: dict[str, Any]) -> str:
    return "  ".join(f"{name}={value}" for name, value in record.items())


def report(name: str, arguments: argparse.Namespace) -> gpu_timing.Report:
    return gpu_timing.Report(name, arguments.dry_run, gpu_timing.read_bandwidth())
