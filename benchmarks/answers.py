"""Whether an engine that serves many fine-tunes in one batch answers as each one's restored checkpoint does.

    python benchmarks/answers.py --models DIR [--codecs bitdelta auto] [--bits 1] [--prompts 100]

DIR is as for `fidelity.py`. Each fine-tune is compressed (adapters are taken as they are), restored, and judged on its
task by transformers; then one engine is asked everything at once, rows of all variants and of the bare base mixed. Its
`read` figures are log-probabilities of the right answers as parts of prompts, its `written` ones answers that it
generated greedily: as many right ones as transformers finds, and no other variant's. Exit code 1 if the engine is
further than --tolerance from transformers on any.

One JSON line per fine-tune and codec in benchmarks/results/answers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from fidelity_tasks import Judge, Sample, Task, make_task, summed
from finetunes import add_models, completed, rows_of
from revision import commit, shortened

from bitdelta_core import Engine, EngineConfig, SamplingParams
from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.auto import compress as compress_auto
from bitdelta_core.delta.auto_options import AutoOptions
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.distill import DistillOptions
from bitdelta_core.delta.format import open_delta
from bitdelta_core.delta.lora import is_adapter
from bitdelta_core.delta.restore import restore
from bitdelta_core.engine.completion import Completion

_BASE_ROWS = 0.1
"""Of all rows, besides."""


@dataclass
class Variant:
    """A fine-tune, compressed."""

    name: str
    codec: str
    delta: Path
    task: Task
    theirs: dict[str, float]
    """What transformers finds of the restored checkpoint"""
    sha256: str = ""


def variants(args: argparse.Namespace, dtype: torch.dtype, work: Path) -> Iterator[Variant]:
    for spec in args.finetunes:
        path, _, named = spec.partition("=")
        for codec in ["lora"] if is_adapter(Path(path)) else args.codecs:
            out = work / f"{Path(path).name}-{codec}"
            delta = _compressed(args, Path(path), codec, out / "delta")
            restored = restore(args.base, delta, out / "restored")
            name, rows = rows_of(args, Path(path).name, named)
            chosen = random.Random(0).sample(list(rows), min(_count(args, rows), len(rows)))
            task = _shortened(make_task(name, chosen, restored), args.longest)
            yield Variant(Path(path).name, codec, delta, task, _judged(restored, task, dtype, args.device))


def _count(args: argparse.Namespace, rows: Sequence[Any]) -> int:
    return args.windows if isinstance(rows[0], str) else args.answers if isinstance(rows[0], dict) else args.prompts


def _shortened(task: Task, longest: int) -> Task:
    return Task(task.name, [Sample(s.ids[:longest], s.scored) for s in task.samples], task.exact)


def _compressed(args: argparse.Namespace, source: Path, codec: str, out: Path) -> Path:
    if codec == "auto":
        return compress_auto(args.base, source, out, AutoOptions(bits=args.bits), device=args.device)
    training = DistillOptions(steps=args.distill_steps) if codec == "bitdelta" and args.distill_steps else None
    return compress(args.base, source, out, distillation=training, device=args.device)


def _judged(restored: Path, task: Task, dtype: torch.dtype, device: str) -> dict[str, float]:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(restored, dtype=dtype)
    chosen = list(range(len(task.samples)))
    figures = Judge(task, device, None).figures(model.to(device).eval(), chosen)
    score = summed(figures, chosen, exact=task.exact)
    return {"nats": score.nats} | ({"exact_match": score.exact_match} if score.exact_match is not None else {})


def asked(engine: Engine, served: Sequence[Variant], vocabulary: int) -> dict[tuple[str, str], dict[str, float]]:
    """(fine-tune, codec) -> what the engine says, all of it asked at once in an order of no meaning."""
    rows = [(variant, sample) for variant in served for sample in variant.task.samples]
    random.Random(1).shuffle(rows)
    read, written = _all_read(engine, rows, vocabulary), _all_written(engine, rows)
    found = {}
    for variant in served:
        own = [(sample, done) for (of, sample), done in zip(rows, read, strict=True) if of is variant]
        found[variant.name, variant.codec] = _read(own, variant.task.exact)
        right = [_is_right(sample, done) for of, sample, done in written if of is variant]
        found[variant.name, variant.codec] |= {"written": sum(right) / len(right)} if right else {}
    return found


def _all_read(engine: Engine, rows: Sequence[tuple[Variant, Sample]], vocabulary: int) -> list[Completion]:
    """Right answers as parts of prompts, and rows of the base among them whose answers nobody needs."""
    plain = [sample for _, sample in rows if max(sample.ids) < vocabulary]
    bare = random.Random(2).sample(plain, int(_BASE_ROWS * len(plain)))
    done = engine.generate(
        [sample.ids for sample in [*(sample for _, sample in rows), *bare]],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        delta=[*(variant.sha256 for variant, _ in rows), *[None] * len(bare)],
    )
    return done[: len(rows)]


def _all_written(engine: Engine, rows: Sequence[tuple[Variant, Sample]]) -> list[tuple[Variant, Sample, Completion]]:
    """Answers to those prompts that have a right one."""
    writing = [(variant, sample) for variant, sample in rows if variant.task.exact]
    if not writing:
        return []
    longest = max(len(sample.ids) - sample.scored for _, sample in writing)
    done = engine.generate(
        [sample.ids[: sample.scored] for _, sample in writing],
        SamplingParams(temperature=0, max_tokens=longest + 1, skip_special_tokens=False),
        delta=[variant.sha256 for variant, _ in writing],
    )
    return [(*row, completion) for row, completion in zip(writing, done, strict=True)]


def _read(own: Sequence[tuple[Sample, Completion]], exact: bool) -> dict[str, float]:
    nats, right, tokens = 0.0, 0, 0
    for sample, completion in own:
        assert completion.prompt_logprobs is not None
        places = [place.chosen for place in completion.prompt_logprobs[sample.scored :] if place is not None]
        nats -= sum(place.logprob for place in places)
        tokens += len(places)
        right += all(place.rank == 1 for place in places)
    return {"nats": nats / tokens} | ({"exact_match": right / len(own)} if exact else {})


def _is_right(sample: Sample, done: Completion) -> bool:
    """The end of text is no part of what an engine returns."""
    wanted = sample.ids[sample.scored :]
    return [*done.token_ids, wanted[-1]][: len(wanted)] == wanted and done.finish_reason == "stop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--codecs", nargs="+", default=["bitdelta", "auto"], choices=["bitdelta", "auto"])
    parser.add_argument("--bits", type=float, default=1.0, help="of auto")
    parser.add_argument("--distill-steps", type=int, default=50, help="of bitdelta; 0: no training")
    parser.add_argument("--prompts", type=int, default=100, help="of exact match, for each fine-tune")
    parser.add_argument("--answers", type=int, default=12, help="of chat")
    parser.add_argument("--windows", type=int, default=2, help="documents")
    parser.add_argument("--longest", type=int, default=1024, help="tokens of a sample; the rest is cut off")
    parser.add_argument("--tolerance", type=float, default=0.03, help="of nats, relative, and of exact match")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--commit", help="recorded; by default git is asked")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "answers.jsonl")
    args = completed(parser.parse_args(), parser)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = EngineConfig(device=args.device, max_model_len=args.longest + 64, max_num_seqs=64)
    with tempfile.TemporaryDirectory() as work:
        served = list(variants(args, config.torch_dtype, Path(work)))
        by_size = sorted(served, key=lambda variant: open_delta(variant.delta).nbytes)
        largest = {variant.codec: str(variant.delta) for variant in by_size}
        config = replace(config, cuda_graph_deltas=tuple(largest.values()))
        with Engine(args.base, config) as engine:
            for variant in served:
                variant.sha256 = engine.add_delta(variant.delta)
            began = time.monotonic()
            ours = asked(engine, served, Checkpoint(args.base).config["vocab_size"])
            seconds = time.monotonic() - began
    conditions = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": args.commit or commit(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "dtype": str(config.torch_dtype).removeprefix("torch."),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "command": " ".join(["benchmarks/answers.py", *map(shortened, sys.argv[1:])]),
        "together": len(served),
        "seconds": round(seconds, 2),
    }
    raise SystemExit(int(_reported(served, ours, conditions, args)))


def _off(variant: Variant, own: dict[str, float]) -> float:
    """How far the engine is from transformers: relative nats, where these are more than one, and right answers."""
    nats = abs(own["nats"] - variant.theirs["nats"]) / max(variant.theirs["nats"], 1.0)
    right = [abs(own[key] - variant.theirs["exact_match"]) for key in ("exact_match", "written") if variant.task.exact]
    return max([nats, *right])


def _reported(
    served: Sequence[Variant],
    ours: dict[tuple[str, str], dict[str, float]],
    conditions: dict[str, Any],
    args: argparse.Namespace,
) -> bool:
    """Write the lines. Returns whether any is too far off."""
    far = False
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as out:
        for variant in served:
            own = ours[variant.name, variant.codec]
            off = _off(variant, own)
            far = far or off > args.tolerance
            record = {
                "finetune": variant.name,
                "codec": variant.codec,
                "samples": len(variant.task.samples),
                "transformers": variant.theirs,
                "engine": own,
                "off": round(off, 5),
            }
            out.write(json.dumps({**record, **conditions}) + "\n")
            print(json.dumps(record), flush=True)
    if far:
        print(f"further than {args.tolerance} from transformers", file=sys.stderr)
    return far


if __name__ == "__main__":
    main()
