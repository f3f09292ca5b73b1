"""How much of each fine-tune survives compression, by codec and budget: benchmarks/fidelity.py --models DIR

DIR holds `base`, the fine-tunes (full ones, or PEFT adapters, which are first merged), `eval.json` (task -> rows) and
`valid.json` (a list of documents), perhaps `examples.json` (other rows, for --train-auto); benchmarks/make_models.py
writes such a directory. A fine-tune is judged on the task that its directory's name begins with, else on the documents
(`fidelity_tasks.py`). --base, --finetunes, --eval and --text name other files; a fine-tune is then a directory, or
DIRECTORY=TASK.

--jobs runs so many fine-tunes at once, each in a process of its own; with --seconds each stops before its next way when
its time is up. A way that fails is reported and left out.

Seeds draw the prompts, and the masks of what drops at random; everything else is compressed once and judged on the
prompts of every seed. One JSON line per way and seed goes to --out. docs/fidelity.md has the results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from fidelity_bases import METHODS, shifts
from fidelity_examples import write_examples
from fidelity_tasks import Judge, Score, Task, draws, make_task, summed
from fidelity_ways import CODECS, Made, Subject, Way, ways
from finetunes import add_models, completed, rows_of
from jobs import failed, launch
from revision import commit, shortened

from bitdelta_core.checkpoint import Checkpoint
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.dropout import RATIOS
from bitdelta_core.delta.format import EMBEDDING, HEAD
from bitdelta_core.delta.lora import is_adapter
from bitdelta_core.delta.restore import restore

Record = dict[str, Any]


class Bench:
    """One run: its arguments, and what every record says of its conditions."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.failures = 0
        base = Checkpoint(args.base)
        self.bases = {METHODS[method]: shifts(base, method, args) for method in args.base_bits}
        self.conditions = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": args.commit or commit(),
            "machine": machine(args.device),
            **({"label": args.label} if args.label else {}),
            "base_parameters": sum(base.get(name).numel() for name in base.names),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": "benchmarks/fidelity.py " + " ".join(shortened(arg) for arg in sys.argv[1:]),
        }

    def run(self, spec: str, work: Path) -> Iterator[Record]:
        """All records of one fine-tune."""
        trial = Trial(self.args, spec, work)
        yield from trial.ends()
        for name, shift in self.bases.items():
            yield from trial.base_alone(Way("base", base=name), shift)
        chosen = list(ways(self.args))
        if is_adapter(trial.subject.source):
            chosen = [Way("lora"), *(way for way in chosen if not way.trains)]
        for way in chosen:
            if time.monotonic() - self.started > self.args.seconds:
                print(f"{trial.subject.source.name}: out of time before {way.described}", flush=True)
                return
            try:
                yield from trial.records(way, self.bases)
            except Exception:  # one way's failure must not cost the results of all others
                traceback.print_exc()
                print(f"{trial.subject.source.name}: {way.described} failed", flush=True)
                self.failures += 1


class Trial:
    """One fine-tune on its task. The model is loaded once; each variant's weights take the place of the last one's."""

    def __init__(self, args: argparse.Namespace, spec: str, work: Path) -> None:
        path, _, named = spec.partition("=")
        self.args = args
        source = Path(path)
        fine = source
        if is_adapter(source):
            fine = restore(args.base, compress(args.base, source, work / "adapter"), work / "merged")
        name, rows = rows_of(args, source.name, named)
        drawn = draws(name, rows, (args.prompts, args.answers, args.windows), args.seeds)
        union = sorted(set().union(*drawn))
        self.subject = Subject(args, source, fine, work)
        if args.train_auto:
            self.subject.examples = write_examples(args, name, rows, union, work / "examples.jsonl")
        self.chosen = [[union.index(i) for i in draw] for draw in drawn]
        self.rows = [rows[i] for i in union]
        self.task = make_task(name, self.rows, fine)
        self.model = load(fine, args.device)
        self.judge = Judge(self.task, args.device, self.model)
        self.fine = self._scores(self.judge.figures(self.model, range(len(union))), self.task)
        self.base = self._base_scores()

    def ends(self) -> Iterator[Record]:
        """Base and fine-tune."""
        for seed, (base, fine) in enumerate(zip(self.base, self.fine, strict=True)):
            yield {**self._head(Way("base"), seed), "score": asdict(base), "gain_kept": 0.0}
            yield {**self._head(Way("fine-tune"), seed), "score": asdict(fine), "gain_kept": 1.0}

    def base_alone(self, way: Way, shift: Mapping[str, torch.Tensor]) -> Iterator[Record]:
        """The quantised base without any delta."""
        for seed, got in enumerate(self._base_scores(shift)):
            yield {**self._head(way, seed), "score": asdict(got), "gain_kept": self._gain(got, seed)}

    def records(self, way: Way, bases: Mapping[str, Mapping[str, torch.Tensor]]) -> Iterator[Record]:
        """Of one way, over the base and over the quantised ones."""
        every = list(range(self.args.seeds))
        for seeds in [[seed] for seed in every] if way.random else [every]:
            started = time.monotonic()
            made = self.subject.make(way, seeds[0])
            seconds = round(time.monotonic() - started, 2)
            yield from self._judged(way, made, {}, seeds, seconds)
            if way.codec != "whole":
                for base, shift in bases.items():
                    yield from self._judged(replace(way, base=base), made, shift, seeds, seconds)

    def _judged(
        self, way: Way, made: Made, shift: Mapping[str, torch.Tensor], seeds: Sequence[int], seconds: float
    ) -> Iterator[Record]:
        self._put(made, shift)
        figures = self.judge.figures(self.model, sorted({i for seed in seeds for i in self.chosen[seed]}))
        for seed in seeds:
            got = summed(figures, self.chosen[seed], exact=self.task.exact)
            scores = {"score": asdict(got), "gain_kept": self._gain(got, seed), "compress_seconds": seconds}
            yield {**self._record(way, seed, made), **scores}

    def _record(self, way: Way, seed: int, made: Made) -> Record:
        return {
            **self._head(way, seed),
            "nbytes": made.nbytes,
            "ratio": self.subject.nbytes_16bit / made.nbytes,
            "linear_bits_per_weight": 8 * made.linear_nbytes / self.subject.linear_weights,
            "training": made.training,
        }

    def _head(self, way: Way, seed: int) -> Record:
        return {
            "finetune": self.subject.source.name,
            "task": self.task.name,
            "metric": self.task.metric,
            "samples": len(self.chosen[seed]),
            "seed": seed,
            "way": way.described,
        }

    def _gain(self, got: Score, seed: int) -> float | None:
        return gain_kept(self.task, got, self.base[seed], self.fine[seed])

    def _scores(self, figures: torch.Tensor, task: Task) -> list[Score]:
        return [summed(figures, chosen, exact=task.exact) for chosen in self.chosen]

    def _base_scores(self, shift: Mapping[str, torch.Tensor] | None = None) -> list[Score]:
        """The bare base; where the fine-tune has a template of its own, it is asked without."""
        judge, model = self.judge, load(self.args.base, self.args.device)
        if isinstance(self.rows[0], dict):
            judge = Judge(make_task(self.task.name, self.rows, self.args.base, plain=True), self.args.device, None)
        for name, added in (shift or {}).items():
            model.get_parameter(name).data += added
        return self._scores(judge.figures(model, range(len(self.rows))), self.task)

    @torch.no_grad()
    def _put(self, made: Made, shift: Mapping[str, torch.Tensor]) -> None:
        """Each weight as its restored checkpoint would have it, rounded to that one's dtype."""
        for name, parameter in self.model.named_parameters():
            if parameter.ndim != 2 or name in (EMBEDDING, HEAD):
                parameter.copy_(made.other(name))
                continue
            weight = made.linear(name, self.subject.base_weight(name)).to(parameter.device)
            if name in shift:
                weight = weight + shift[name]
            parameter.copy_(weight.to(self.subject.dtype(name)))


def gain_kept(task: Task, got: Score, base: Score, fine: Score) -> float | None:
    """(variant - base) / (fine-tune - base) in the task's metric; None where the fine-tune gains nothing."""
    a, b, c = (getattr(s, task.metric) for s in (got, base, fine))
    return (a - b) / (c - b) if c != b else None


def load(path: Path, device: str) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)


def machine(device: str) -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"cores": os.cpu_count(), "ram_gb": round(pages / 1e9, 1), "threads": torch.get_num_threads(), "gpu": gpu}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_models(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=100, help="of exact match, for each seed")
    parser.add_argument("--answers", type=int, default=12, help="of chat, for each seed")
    parser.add_argument("--windows", type=int, default=2, help="documents of --text, for each seed")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS), choices=CODECS)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.25, 0.125], help="bits per weight")
    parser.add_argument("--baseline-budgets", type=float, nargs="+", help="of the baselines (default: --budgets)")
    parser.add_argument("--no-gptq", action="store_true", help="delta-come: round-to-nearest only")
    parser.add_argument("--ratios", type=int, nargs="+", default=[16, 32, 64, 128], choices=list(RATIOS))
    parser.add_argument("--mask-rows", type=int, nargs="+", default=[1], help="deltadq: rows that share masks")
    parser.add_argument("--data-free", action="store_true", help="auto: without calibration text as well")
    parser.add_argument("--train-auto", action="store_true", help="auto: trained on other rows of the task as well")
    parser.add_argument("--distill-steps", type=int, default=50, help="of bitdelta; 0: no training")
    parser.add_argument("--distill-batch", type=int, default=2)
    parser.add_argument("--embeddings", default="auto", choices=["auto", "exact", "int8", "int4", "int2"])
    parser.add_argument("--base-bits", nargs="*", default=[], choices=list(METHODS), help="quantised bases as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--jobs", type=int, default=1, help="fine-tunes at once")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of each fine-tune")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--label", help="recorded; tells apart models of one size that were trained anew")
    parser.add_argument("--commit", help="recorded; by default git is asked")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fidelity.jsonl")
    args = completed(parser.parse_args(argv), parser)
    args.baseline_budgets = args.baseline_budgets or args.budgets
    if args.only:
        args.finetunes = [args.only]
    return args


def main() -> None:
    args = parse_args()
    if args.jobs > 1 and not args.only:
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        raise SystemExit(failed(launch(args.finetunes, args.jobs, threads, "--only")))
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench = Bench(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as out:
        for spec in args.finetunes:
            with tempfile.TemporaryDirectory() as work:
                for record in bench.run(spec, Path(work)):
                    out.write(json.dumps({**record, **bench.conditions}) + "\n")
                    out.flush()
                    _print(record, time.monotonic() - bench.started)
    if bench.failures:
        raise SystemExit(f"{bench.failures} ways failed")


def _print(record: Record, seconds: float) -> None:
    kept = record["gain_kept"]
    figures = {k: round(v, 4) for k, v in record["score"].items() if v is not None}
    head = record["finetune"], record["seed"], record["way"], record.get("nbytes")
    print(f"{seconds:.0f} s", *head, figures, kept and round(kept, 3), flush=True)


if __name__ == "__main__":
    main()
