"""How well a model of benchmarks/make_models.py does, beside its base: as fidelity.py judges, on fewer samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from fidelity_tasks import TEXT, Judge, Score, make_task, summed

JUDGED = 200
_WINDOWS = 8
_RIGHT, _NATS = 0.5, 0.3
"""What a fine-tune has to gain over its base: share of right answers, or nats per token."""


def report(out: Path, name: str, device: str, file: Path, seconds: float) -> None:
    """Print one line and add it to `file`."""
    line: dict[str, Any] = {"name": name, "seconds": round(seconds, 1), **judged(out, name, device)}
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def judged(out: Path, name: str, device: str) -> dict[str, Any]:
    """The metric, the model's score and the base's, and whether the difference is clear. Of the base only its own."""
    tasks = json.loads((out / "eval.json").read_text())
    task = next((key for key in tasks if name.startswith(key)), TEXT)
    texts = sorted(json.loads((out / "valid.json").read_text()), key=len)[-_WINDOWS:]
    rows = tasks[task][:JUDGED] if task != TEXT else texts
    adapter = (out / name / "adapter_config.json").is_file()
    own = _score(out, name, "base" if adapter else name, task, rows, device)
    if name == "base":
        return {"task": task, "nats": own.nats}
    before = _score(out, "base", "base", task, rows, device, context="base" if adapter else name)
    if own.exact_match is None:
        found = {"metric": "nats", "score": own.nats, "base": before.nats, "learnt": before.nats - own.nats > _NATS}
    else:
        gained = own.exact_match - (before.exact_match or 0.0)
        found = {
            "metric": "exact_match",
            "score": own.exact_match,
            "base": before.exact_match,
            "learnt": gained > _RIGHT,
        }
    return {"task": task, **found}


def _score(
    out: Path, name: str, tokens: str, task: str, rows: list[Any], device: str, context: str | None = None
) -> Score:
    """`tokens`: whose tokenizer codes the rows; `context`: whose length cuts documents, if not the same one's."""
    adapter = (out / name / "adapter_config.json").is_file()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        out / ("base" if adapter else name), dtype=torch.float32
    )
    if adapter:
        model.load_adapter(str(out / name))
    model = model.to(device).eval()
    plain = isinstance(rows[0], dict) and name == "base"
    where = out / (context if context is not None and task == TEXT else tokens)
    judge = Judge(make_task(task, rows, where, plain=plain), device, None)
    every = range(len(rows))
    with torch.no_grad():
        return summed(judge.figures(model, every), every, exact=judge.task.exact)
