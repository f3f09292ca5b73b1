"""Tokens per second of our engine against transformers, one restored model after another, on this CPU.

    python benchmarks/serve_cpu.py --base BASE --variants FINETUNE... [--counts 1 4 16]

The same prompts, the same dtype, greedy, in one run; every answer is compared. At each count V, prompt i goes to
variant i mod V. Where fewer fine-tunes are given than the largest count needs, more are made from them by adding noise
to their weights before compressing, so that every delta is another one.

Two ways to serve with transformers, each with the models' loading left out and counted in: `prompts` generates one
prompt after the other, `batched` all prompts of a variant in one padded batch. Ours answers all prompts together.

Seconds are of the wall clock. On a machine that others use as well, the tokens per CPU second (all threads of this
process) say more; both stand in the table.

Writes one JSON line per measurement to benchmarks/results/serve_cpu.jsonl. Exit code 1 if an answer differs in float32
(in bfloat16 the two round differently, and near ties go either way; how many differ is in the results).
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from revision import commit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitdelta_core import Engine, EngineConfig, SamplingParams
from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.lora import is_adapter
from bitdelta_core.delta.restore import restore

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESULTS = Path(__file__).parent / "results" / "serve_cpu.jsonl"
PROMPTS = (
    "12 + 30 =",
    "The function returns the number of",
    "def read(path):\n    ",
    "A list of names, each on its own line:",
    "The first thing that the program does is to open the file and",
    "If the connection is closed before the reply has arrived,",
    "417 - 96 =",
    "import os\n\nfor name in",
)
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """One prompt for one variant."""

    variant: int
    prompt: Tokens


@dataclass
class Variants:
    """Deltas to serve, and the restored checkpoints that the peer loads."""

    base: Path
    deltas: list[Path]
    restored: list[Path]

    @property
    def storage_bytes(self) -> list[int]:
        return [sum(f.stat().st_size for f in d.iterdir()) for d in self.deltas]


def prepare(base: Path, finetunes: Sequence[Path], count: int, work: Path) -> Variants:
    """Compress and restore `count` variants; beyond those given, noisy ones."""
    deltas, restored = [], []
    for i in range(count):
        source = finetunes[i % len(finetunes)]
        if i >= len(finetunes):
            source = with_noise(base, source, work / f"noisy-{i}", seed=i)
        deltas.append(compress(base, source, work / f"delta-{i}"))
        restored.append(restore(base, deltas[-1], work / f"restored-{i}", dtype=torch.float32))
    return Variants(base, deltas, restored)


def with_noise(base: Path, source: Path, out: Path, *, seed: int) -> Path:
    """A copy of a fine-tune or adapter whose change is half noise of the change's own size."""
    generator = torch.Generator().manual_seed(seed)
    out.mkdir()
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
            (out / file.name).write_bytes(file.read_bytes())
    if is_adapter(source):
        tensors = load_file(source / "adapter_model.safetensors")
        noisy = {k: t + 0.3 * t.float().std() * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}
        save_file({k: t.to(tensors[k].dtype) for k, t in noisy.items()}, out / "adapter_model.safetensors")
        return out
    before, after = Checkpoint(base), Checkpoint(source)
    tensors = {}
    for name, tensor in after.items():
        tensors[name] = tensor.clone()
        if name in before and before.shape(name) == tuple(tensor.shape) and tensor.ndim == 2:
            spread = (tensor.float() - before.get(name).float()).std()
            tensors[name] = (tensor.float() + spread * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def ours(variants: Variants, tasks: Sequence[Task], new_tokens: int, repeats: int, dtype: str) -> dict[str, Any]:
    """Our engine: cold (start, load, answer) once, then warm."""
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    config = EngineConfig(
        device="cpu", dtype=dtype, enable_prefix_caching=False, max_num_seqs=len(tasks), kv_cache_bytes=256 << 20
    )
    gc.collect()
    begun, rss, cold = time.perf_counter(), rss_bytes(), 0.0
    with Engine(variants.base, config) as engine:
        count = max(task.variant for task in tasks) + 1
        started_rss = rss_bytes()
        shas = [engine.add_delta(delta) for delta in variants.deltas[:count]]
        answers, seconds, cpu = [], [], []
        for _ in range(repeats + 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            done = engine.generate([t.prompt for t in tasks], params, delta=[shas[t.variant] for t in tasks])
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - cpu_start)
            answers = [tuple(c.token_ids) for c in done]
            if len(seconds) == 1:
                cold = time.perf_counter() - begun
        stats = engine.stats()
    return {
        "answers": answers,
        "seconds": statistics.median(seconds[1:]),
        "cpu_seconds": statistics.median(cpu[1:]),
        "seconds_with_loading": cold,
        "slab_bytes_per_variant": stats.slab_bytes_used / count,
        "rss_bytes_base": started_rss - rss,
        "steps_per_s": stats.steps_total / sum(seconds),
    }


def peer(variants: Variants, tasks: Sequence[Task], new_tokens: int, dtype: str, batched: bool) -> dict[str, Any]:
    """transformers: one restored model after another."""
    answers: dict[int, Tokens] = {}
    loading = generating = cpu = 0.0
    for variant in sorted({task.variant for task in tasks}):
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(variants.restored[variant], dtype=DTYPES[dtype]).eval()
        model.generation_config.eos_token_id = None
        loading += time.perf_counter() - start
        mine = [i for i, task in enumerate(tasks) if task.variant == variant]
        groups = [mine] if batched else [[i] for i in mine]
        generate(model, [tasks[mine[0]].prompt], 2)
        start, cpu_start = time.perf_counter(), time.process_time()
        for group in groups:
            found = generate(model, [tasks[i].prompt for i in group], new_tokens)
            answers.update(zip(group, found, strict=True))
        generating += time.perf_counter() - start
        cpu += time.process_time() - cpu_start
        del model
        gc.collect()
    return {
        "answers": [answers[i] for i in range(len(tasks))],
        "seconds": generating,
        "cpu_seconds": cpu,
        "seconds_with_loading": generating + loading,
    }


def alone(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Each system in a process of its own: OpenMP threads that one leaves behind would slow the other down."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=quiet, initargs=(torch.get_num_threads(),)) as pool:
        return pool.submit(function, *args).result()


def quiet(threads: int) -> None:
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def generate(model: Any, prompts: Sequence[Tokens], new_tokens: int) -> list[Tokens]:
    """Greedy answers of one padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return [tuple(row[longest:]) for row in out.tolist()]


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resident_bytes_per_variant(variants: Variants, count: int, dtype: str) -> dict[str, float]:
    """Growth of the process for every variant after the first, all of them resident."""
    config = EngineConfig(device="cpu", dtype=dtype, kv_cache_bytes=16 << 20)
    params = SamplingParams(temperature=0, max_tokens=1)
    with Engine(variants.base, config) as engine:
        shas = [engine.add_delta(delta) for delta in variants.deltas[:count]]
        engine.generate((1, 2), params, delta=shas[0])
        gc.collect()
        rss, slab = rss_bytes(), engine.stats().slab_bytes_used
        for sha256 in shas[1:]:
            engine.generate((1, 2), params, delta=sha256)
        gc.collect()
        grown = engine.stats()
        assert len(grown.resident) == count, "the slab is too small to measure this"
        return {
            "process": (rss_bytes() - rss) / (count - 1),
            "slab": (grown.slab_bytes_used - slab) / (count - 1),
            "storage": sum(variants.storage_bytes[1:count]) / (count - 1),
            "restored_float32": sum(f.stat().st_size for f in variants.restored[0].glob("*.safetensors")),
        }


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "ram_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "base": arguments.base.name,
        "variants": [path.name for path in arguments.variants],
        "dtype": arguments.dtype,
        "prompts": arguments.prompts,
        "new_tokens": arguments.new_tokens,
        "repeats": arguments.repeats,
    }


def tasks_for(variants: Variants, count: int, prompts: int, tokenizer: Callable[[str], Any]) -> list[Task]:
    texts = [f"{PROMPTS[i % len(PROMPTS)]}{' ' * (i // len(PROMPTS))}" for i in range(prompts)]
    return [Task(i % count, tuple(tokenizer(text)["input_ids"])) for i, text in enumerate(texts)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--variants", type=Path, nargs="+", required=True, help="fine-tune or PEFT adapter directories")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    quiet(arguments.threads)
    with tempfile.TemporaryDirectory() as work:
        return run(arguments, Path(work))


def run(arguments: argparse.Namespace, work: Path) -> int:
    variants = prepare(arguments.base, arguments.variants, max(arguments.counts), work)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.base)
    context, records, wrong = conditions(arguments), [], 0
    print(f"{'variants':>8} {'system':<21} {'tokens/s':>16} {'per CPU second':>16} {'with loading':>16}   (ours by)")
    for count in arguments.counts:
        tasks = tasks_for(variants, count, arguments.prompts, tokenizer)
        measured = {
            "bitdelta": alone(ours, variants, tasks, arguments.new_tokens, arguments.repeats, arguments.dtype),
            "transformers prompts": alone(peer, variants, tasks, arguments.new_tokens, arguments.dtype, False),
            "transformers batched": alone(peer, variants, tasks, arguments.new_tokens, arguments.dtype, True),
        }
        reference = measured["transformers prompts"].pop("answers")
        for system, result in measured.items():
            different = sum(a != b for a, b in zip(result.pop("answers", reference), reference, strict=True))
            wrong += different
            tokens = len(tasks) * arguments.new_tokens
            result |= {
                "tokens_per_s": tokens / result["seconds"],
                "tokens_per_cpu_s": tokens / result["cpu_seconds"],
                "tokens_per_s_with_loading": tokens / result["seconds_with_loading"],
                "different_answers": different,
            }
            kinds = ("tokens_per_s", "tokens_per_cpu_s", "tokens_per_s_with_loading")
            cells = " ".join(f"{result[k]:>9.1f} {measured['bitdelta'][k] / result[k]:>5.2f}x" for k in kinds)
            print(f"{count:>8} {system:<21} {cells}" + f"   {different} answers differ" * bool(different), flush=True)
            records.append({**context, "count": count, "system": system, **result})
    if max(arguments.counts) > 1:
        memory = resident_bytes_per_variant(variants, max(arguments.counts), arguments.dtype)
        print("bytes per extra variant: " + ", ".join(f"{name} {value / 1e6:.2f} MB" for name, value in memory.items()))
        records.append({**context, "count": max(arguments.counts), "bytes_per_extra_variant": memory})
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return 1 if wrong and arguments.dtype == "float32" else 0


if __name__ == "__main__":
    sys.exit(main())
