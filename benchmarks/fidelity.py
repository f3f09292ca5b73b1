"""How much of each fine-tune survives compression: benchmarks/fidelity.py BASE FINETUNE... --eval FILE --text FILE

FINETUNE is a directory, or DIRECTORY=TASK. TASK is a key of the evaluation file, or `text`; by default the key that the
directory's name begins with, else `text`. The evaluation file is a JSON object; each task is a list of [prompt, answer]
(exact match of the greedy continuation) or of {"messages": [...], "answer": ...} (nats per answer token under the chat
template; the bare base reads the last message as a plain prompt). The text file is a JSON list of documents (nats per
token in windows of the variant's context). An adapter is first restored to a full checkpoint, so that the sign codec
can be judged on it too.

Every variant is scored as its restored checkpoint in transformers. One JSON line per variant goes to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from bitdelta_core.delta import auto
from bitdelta_core.delta.auto import AutoOptions
from bitdelta_core.delta.compress import compress
from bitdelta_core.delta.distill import DistillOptions
from bitdelta_core.delta.dropout import RATIOS, DropoutOptions
from bitdelta_core.delta.format import open_delta
from bitdelta_core.delta.inspect import summarise
from bitdelta_core.delta.lora import is_adapter
from bitdelta_core.delta.planning import CompressOptions
from bitdelta_core.delta.restore import restore

LAYOUTS = ("tensor", "row", "row_col")
NEW_TOKENS = 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids; those from `scored` on are judged."""

    ids: list[int]
    scored: int


@dataclass(frozen=True, slots=True)
class Task:
    """What a variant is judged on."""

    name: str
    samples: list[Sample]
    prompts: list[str]
    """Empty where no exact match is asked for."""
    answers: list[str]

    @property
    def metric(self) -> str:
        return "exact_match" if self.prompts else "nats"


@dataclass(frozen=True, slots=True)
class Score:
    """A variant's figures; kl (fine-tune || variant, nats per token) and top1 are against the fine-tune."""

    exact_match: float | None
    nats: float
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compress."""

    codec: str
    scale: str | None = None
    bits: int | None = None
    distill: bool = False
    embeddings: str | None = None
    """None: as --embeddings says. auto has them in its budget."""
    ratio: int | None = None
    """deltadq: by the paper's count"""
    mask_rows: int | None = None
    """deltadq"""
    budget: float | None = None
    """auto: bits per weight"""
    calibrate: bool | None = None
    """auto: False weighs all errors alike."""


def ways(args: argparse.Namespace) -> Iterator[Way]:
    """The grid; distil "some": one bit in every layout, more bits with row scales only, and auto."""
    for budget in args.budgets:
        yield Way("auto", budget=budget)
        if args.data_free:
            yield Way("auto", budget=budget, calibrate=False)
        if args.distil != "none":
            yield Way("auto", budget=budget, distill=True)
    for ratio in args.ratios:
        for mask_rows in args.mask_rows:
            yield Way("deltadq", ratio=ratio, mask_rows=mask_rows)
    if args.dense:
        yield Way("dense")
        for embeddings in ("int8", "int4", "int2"):
            yield Way("dense", embeddings=embeddings)
    for bits in args.bits:
        for scale in args.scales:
            yield Way("bitdelta", scale, bits)
            if args.distil == "all" or (args.distil == "some" and (bits == 1 or scale == "row")):
                yield Way("bitdelta", scale, bits, distill=True)


def load(path: Path) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(DEVICE).eval()


def tokenizer_of(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path)


def make_task(name: str, rows: Sequence[Any], fine: Path, *, plain: bool, windows: int) -> Task:
    """The task as this checkpoint's tokenizer sees it; `plain`: without its chat template."""
    tokenizer = tokenizer_of(fine)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    if name == "text":
        return Task(name, list(_windows(rows, tokenizer, bos, fine, windows)), [], [])
    if isinstance(rows[0], dict):
        samples = []
        for row in rows:
            text = row["messages"][-1]["content"] + "\n" if plain else _chat_prompt(tokenizer, row["messages"])
            prompt = (bos if plain else []) + _encode(tokenizer, text)
            samples.append(Sample(prompt + _encode(tokenizer, row["answer"]), len(prompt)))
        return Task(name, samples, [], [])
    pairs = [(bos + _encode(tokenizer, prompt), _encode(tokenizer, answer)) for prompt, answer in rows]
    samples = [Sample(prompt + answer, len(prompt)) for prompt, answer in pairs]
    return Task(name, samples, [row[0] for row in rows], [row[1].strip() for row in rows])


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _chat_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _windows(rows: Sequence[str], tokenizer: Any, bos: list[int], fine: Path, count: int) -> Iterator[Sample]:
    """The first window of each of the longest documents, in the fine-tune's whole context."""
    length = json.loads((fine / "config.json").read_text())["max_position_embeddings"]
    for text in sorted(rows, key=len, reverse=True)[:count]:
        yield Sample((bos + _encode(tokenizer, text))[:length], len(bos))


@torch.no_grad()
def score(model: Any, task: Task, tokenizer: Any, teacher: Any | None, *, batch: int) -> Score:
    """All figures of one model."""
    totals = torch.zeros(4, dtype=torch.float64)  # nats, kl, agreements, tokens
    size = 1 if task.name == "text" else batch
    for start in range(0, len(task.samples), size):
        totals += _score_batch(model, task.samples[start : start + size], teacher)
    nats, kl, same = (totals[:3] / totals[3]).tolist()
    exact = _exact_match(model, task, tokenizer, batch) if task.prompts else None
    return Score(exact, nats, kl if teacher else None, same if teacher else None)


def _score_batch(model: Any, samples: list[Sample], teacher: Any | None) -> torch.Tensor:
    longest = max(len(s.ids) for s in samples)
    ids = torch.tensor([s.ids + [0] * (longest - len(s.ids)) for s in samples], device=DEVICE)
    real = torch.tensor([[i < len(s.ids) for i in range(longest)] for s in samples], device=DEVICE)
    judged = torch.tensor([[s.scored <= i < len(s.ids) for i in range(longest)] for s in samples], device=DEVICE)
    before = judged.roll(-1, 1)  # a token is judged by the logits of the position before it
    logp = model(input_ids=ids, attention_mask=real.long()).logits[before].float().log_softmax(-1)
    nats = -logp.gather(1, ids[judged].unsqueeze(1)).sum()
    if teacher is None:
        return torch.tensor([nats.item(), 0, 0, judged.sum().item()], dtype=torch.float64)
    wanted = teacher(input_ids=ids, attention_mask=real.long()).logits[before].float().log_softmax(-1)
    rows = wanted.shape[1]
    kl = (wanted.exp() * (wanted - logp[:, :rows])).sum()
    same = (wanted.argmax(-1) == logp.argmax(-1)).sum()
    return torch.tensor([nats.item(), kl.item(), same.item(), judged.sum().item()], dtype=torch.float64)


def _exact_match(model: Any, task: Task, tokenizer: Any, batch: int) -> float:
    right = 0
    tokenizer.padding_side = "left"
    for start in range(0, len(task.prompts), batch):
        heads = [s.ids[: s.scored] for s in task.samples[start : start + batch]]
        padded = tokenizer.pad({"input_ids": heads}, return_tensors="pt").to(DEVICE)
        out = model.generate(**padded, do_sample=False, max_new_tokens=NEW_TOKENS)
        texts = tokenizer.batch_decode(out[:, padded["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.strip() == answer for text, answer in zip(texts, task.answers[start:], strict=False))
    return right / len(task.prompts)


def gain_kept(task: Task, got: Score, base: Score, fine: Score) -> float | None:
    """(variant - base) / (fine-tune - base) in the task's metric; None where the fine-tune gains nothing."""
    a, b, c = (getattr(s, task.metric) for s in (got, base, fine))
    return (a - b) / (c - b) if c != b else None


class Bench:
    """One run: its arguments, and what every record says of its conditions."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.distill = DistillOptions(steps=args.distill_steps, batch=args.distill_batch, lr=args.distill_lr)
        self.distill_auto = replace(self.distill, lr=auto.DISTILL.lr)
        self.conditions = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": args.commit or _commit(),
            "machine": machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": "benchmarks/fidelity.py " + " ".join(_shorten(arg) for arg in sys.argv[1:]),
        }

    def run(self, spec: str, work: Path) -> Iterator[dict[str, Any]]:
        """All records of one fine-tune."""
        path, _, named = spec.partition("=")
        source, base = Path(path), self.args.base
        name, rows = self._rows(source.name, named)
        fine = source
        if is_adapter(source):
            delta = compress(base, source, work / "adapter")
            fine = restore(base, delta, work / "merged")
        limits = {"windows": self.args.windows}
        task = make_task(name, rows, fine, plain=False, **limits)
        teacher, tokenizer = load(fine), tokenizer_of(fine)
        own = make_task(name, rows, base, plain=True, **limits) if isinstance(rows[0], dict) else task
        of_base = score(load(base), own, tokenizer_of(base), teacher if own is task else None, batch=self.args.batch)
        of_fine = score(teacher, task, tokenizer, None, batch=self.args.batch)
        common = {"finetune": source.name, "task": name, "metric": task.metric, "samples": len(task.samples)}
        yield {**common, "way": {"codec": "base"}, "score": asdict(of_base), "gain_kept": 0.0}
        yield {**common, "way": {"codec": "fine-tune"}, "score": asdict(of_fine), "gain_kept": 1.0}
        for way in [
            *([Way("lora")] if fine != source else []),
            *ways(self.args),
        ]:
            started = time.monotonic()
            delta = self._compress(way, source, fine, work / "delta")
            seconds = time.monotonic() - started
            summary = summarise(open_delta(delta))
            model = load(restore(base, delta, work / "restored"))
            got = score(model, task, tokenizer, teacher, batch=self.args.batch)
            yield {
                **common,
                "way": {k: v for k, v in asdict(way).items() if v is not None},
                "score": asdict(got),
                "gain_kept": gain_kept(task, got, of_base, of_fine),
                "nbytes": summary.nbytes,
                "ratio": summary.ratio,
                "linear_bits_per_weight": summary.linear_bits_per_weight,
                "value_ratio": summary.linear_value_ratio,
                "distillation": summary.provenance.get("distillation") or summary.provenance.get("measured"),
                "compress_seconds": round(seconds, 1),
            }
            _remove(work / "delta", work / "restored")

    def _compress(self, way: Way, source: Path, fine: Path, out: Path) -> Path:
        if way.codec == "lora":
            return compress(self.args.base, source, out)
        if way.codec == "auto":
            trained = self.distill_auto if way.distill else None
            options = AutoOptions(bits=way.budget, calibrate=way.calibrate is not False, distill=trained)
            return auto.compress(self.args.base, fine, out, options)
        coding: dict[str, Any] = {"codec": way.codec, "embeddings": way.embeddings or self.args.embeddings}
        if way.scale:
            coding |= {"scale_layout": way.scale, "bits": way.bits}
        if way.ratio:
            coding["dropout"] = DropoutOptions.for_ratio(way.ratio, mask_rows=way.mask_rows)
        return compress(
            self.args.base, fine, out, CompressOptions(**coding), distillation=self.distill if way.distill else None
        )

    def _rows(self, directory: str, named: str) -> tuple[str, Sequence[Any]]:
        tasks = json.loads(self.args.eval.read_text()) if self.args.eval else {}
        name = named or next((key for key in tasks if directory.startswith(key)), "text")
        if name != "text":
            return name, tasks[name][: self.args.prompts]
        if self.args.text is None:
            raise SystemExit(f"{directory}: no task of this name in --eval, and no --text to judge it on")
        return name, json.loads(self.args.text.read_text())


def machine() -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else None
    return {"cores": os.cpu_count(), "ram_gb": round(pages / 1e9, 1), "threads": torch.get_num_threads(), "gpu": gpu}


def _commit() -> str:
    """HEAD, with a + where tracked files differ from it."""
    described = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()


def _shorten(arg: str) -> str:
    """Paths by their last part: where things lay on the machine says nothing."""
    return Path(arg).name if "/" in arg else arg


def _remove(*directories: Path) -> None:
    for directory in directories:
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("finetune", nargs="+", help="DIRECTORY or DIRECTORY=TASK")
    parser.add_argument("--eval", type=Path, help="JSON of tasks")
    parser.add_argument("--text", type=Path, help="JSON list of documents")
    parser.add_argument("--prompts", type=int, default=200, help="at most so many per task")
    parser.add_argument("--windows", type=int, default=8, help="documents of --text")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--embeddings", default="auto", choices=["auto", "exact", "int8", "int4", "int2"])
    parser.add_argument("--bits", type=int, nargs="*", default=[1, 2, 3, 4], help="sign planes to try")
    parser.add_argument("--scales", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--budgets", type=float, nargs="*", default=[2.0, 1.0, 0.5, 0.25, 0.125], help="auto: bits")
    parser.add_argument("--data-free", action="store_true", help="auto: without calibration text as well")
    parser.add_argument("--ratios", type=int, nargs="*", default=list(RATIOS), help="deltadq: by the paper's count")
    parser.add_argument("--mask-rows", type=int, nargs="*", default=[1, 16, 64], help="deltadq: rows that share masks")
    parser.add_argument("--dense", action=argparse.BooleanOptionalAction, default=True, help="embeddings alone")
    parser.add_argument("--distil", choices=["all", "some", "none"], default="all", help=ways.__doc__)
    defaults = DistillOptions()
    parser.add_argument("--distill-steps", type=int, default=defaults.steps)
    parser.add_argument("--distill-batch", type=int, default=defaults.batch)
    parser.add_argument("--distill-lr", type=float, default=defaults.lr)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--commit", help="recorded; by default git is asked")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fidelity.jsonl")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bench = Bench(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as out:
        for spec in args.finetune:
            with tempfile.TemporaryDirectory() as work:
                for record in bench.run(spec, Path(work)):
                    out.write(json.dumps({**record, **bench.conditions}) + "\n")
                    out.flush()
                    kept = record["gain_kept"]
                    figures = {k: round(v, 4) for k, v in record["score"].items() if v is not None}
                    print(record["finetune"], record["way"], record.get("nbytes"), figures, kept and round(kept, 3))


if __name__ == "__main__":
    main()
