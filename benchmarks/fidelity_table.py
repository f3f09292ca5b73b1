"""The tables of docs/fidelity.md from the results: benchmarks/fidelity_table.py [RESULTS.jsonl]

Of several measurements of one way the last counts. Prints Markdown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "fidelity.jsonl"
METRICS = {"exact_match": ("exact match", ".2f"), "nats": ("nats per token", ".3f")}
ORDER = ("base", "fine-tune", "lora", "dense", "auto", "deltadq", "bitdelta")


def latest(lines: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Fine-tune -> its records, one per way, in the order of the tables."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for record in map(json.loads, lines):
        found[record["finetune"], json.dumps(record["way"], sort_keys=True)] = record
    by_finetune: dict[str, list[dict[str, Any]]] = {}
    for (finetune, _), record in sorted(found.items(), key=lambda item: _rank(item[1]["way"])):
        by_finetune.setdefault(finetune, []).append(record)
    return by_finetune


def table(records: Sequence[Mapping[str, Any]]) -> str:
    name, form = METRICS[records[0]["metric"]]
    heads = (
        "way",
        "planes",
        "scales",
        "distilled",
        "bytes",
        "ratio",
        "bits per weight of the linears",
        name,
        "KL",
        "gain kept",
    )
    rows = [heads, ("---",) * len(heads), *(_cells(record, form) for record in records)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cells(record: Mapping[str, Any], form: str) -> tuple[str, ...]:
    way, score = record["way"], record["score"]
    name = way["codec"] + (f", embeddings {way['embeddings']}" if way.get("embeddings") else "")
    name += f", {way['budget']:g} bits" if "budget" in way else ""
    name += ", data-free" if way.get("calibrate") is False else ""
    name += f" {way['ratio']}x, masks of {way['mask_rows']}" if "ratio" in way else ""
    sizes = ("", "", "")
    if "nbytes" in record:
        sizes = (f"{record['nbytes']:,}", f"{record['ratio']:.2f}", f"{record['linear_bits_per_weight']:.2f}")
    kl = "" if score.get("kl") is None else f"{score['kl']:.4f}"
    kept = "" if record["gain_kept"] is None else f"{record['gain_kept']:.3f}"
    distilled = _training(record.get("distillation")) if way.get("distill") else ""
    return (
        name,
        str(way.get("bits", "")),
        way.get("scale", ""),
        distilled,
        *sizes,
        format(score[record["metric"]], form),
        kl,
        kept,
    )


def _training(described: Mapping[str, Any] | None) -> str:
    return f"{described['steps']} x {described['batch']}" if described and "steps" in described else "yes"


def _rank(way: Mapping[str, Any]) -> tuple[Any, ...]:
    scales = ("tensor", "row", "row_col")
    scale = scales.index(way["scale"]) if way.get("scale") else -1
    return (
        ORDER.index(way["codec"]),
        -way.get("budget", 0),
        way.get("ratio", 0),
        way.get("mask_rows", 0),
        way.get("bits", 0),
        scale,
        way.get("distill", False),
        way.get("embeddings") or "",
    )


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    for finetune, records in sorted(latest(path.read_text().splitlines()).items()):
        print(f"### {finetune}\n\n{table(records)}\n")


if __name__ == "__main__":
    main()
