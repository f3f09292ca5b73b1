"""The tables of docs/fidelity.md from the results: benchmarks/fidelity_table.py [RESULTS.jsonl] [--details]

One for each base: ways in rows, fine-tunes in columns, the mean over seeds and half of the distance between the least
and the largest of them. Of several measurements of one way and seed the last counts. --details: every figure of each
fine-tune. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results" / "fidelity.jsonl"
METRICS = {"exact_match": "exact match", "nats": "nats per token"}
ORDER = (
    "base",
    "fine-tune",
    "lora",
    "dense",
    "auto",
    "bitdelta",
    "deltadq",
    "delta-come",
    "low-rank",
    "dare",
    "magnitude",
    "whole",
)
SCALES = (None, "tensor", "row", "row_col")
ENDS = ("base", "fine-tune")
Way = Mapping[str, Any]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One way on one fine-tune: its records, one per seed."""

    way: Way
    records: Sequence[Record]

    def values(self, *path: str) -> list[float]:
        """A figure of each seed; none where one of them lacks it."""
        found: list[Any] = list(self.records)
        for key in path:
            found = [value.get(key) for value in found]
        return [] if None in found else found

    def mean(self, *path: str) -> float | None:
        values = self.values(*path)
        return fmean(values) if values else None

    def shown(self, *path: str, digits: int = 3) -> str:
        """The mean, and how far it spreads."""
        values = self.values(*path)
        if not values:
            return ""
        half = (max(values) - min(values)) / 2
        return f"{fmean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


class Models(NamedTuple):
    """A base and its fine-tunes."""

    parameters: int
    """Of the base"""
    label: str = ""
    """What tells apart those that were trained anew"""

    def __str__(self) -> str:
        return f"base of {self.parameters / 1e6:.1f} M parameters" + (f", {self.label}" if self.label else "")


def bases(lines: Sequence[str]) -> dict[Models, dict[str, dict[str, Cell]]]:
    """Models -> fine-tune -> name of a way -> its records, in the order of the tables."""
    latest: dict[tuple[Models, str, str], dict[int, Record]] = {}
    for record in map(json.loads, lines):
        models = Models(record["base_parameters"], record.get("label", ""))
        key = models, record["finetune"], json.dumps(record["way"], sort_keys=True)
        latest.setdefault(key, {})[record["seed"]] = record
    cells = [Cell(json.loads(key[2]), [found[seed] for seed in sorted(found)]) for key, found in latest.items()]
    result: dict[Models, dict[str, dict[str, Cell]]] = {}
    for (models, finetune, _), cell in sorted(
        zip(latest, cells, strict=True), key=lambda item: (*item[0][:2], rank(item[1].way))
    ):
        result.setdefault(models, {}).setdefault(finetune, {})[_named(cell.way)] = cell
    return result


def _named(way: Way) -> str:
    return title(way) + (f" over {way['base']}" if "base" in way else "")


def title(way: Way) -> str:
    """A way as the tables name it, without the base's quantisation."""
    name, budget = way["codec"], f" {way['budget']:g} bits" if "budget" in way else ""
    match name:
        case "auto":
            parts = [", data-free" if way.get("calibrate") is False else "", ", trained" if way.get("distill") else ""]
            return name + budget + "".join(parts)
        case "bitdelta":
            planes = f"{way['bits']} plane" + ("s" if way["bits"] > 1 else "")
            return f"bitdelta, {planes}, {way['scale']} scales" + (", distilled" if way.get("distill") else "")
        case "deltadq":
            shared = f", masks of {way['mask_rows']} rows" if way["mask_rows"] > 1 else ""
            return f"deltadq {way['ratio']}x{shared}"
        case "delta-come":
            return "Delta-CoMe" + (", GPTQ" if way.get("calibrate") else ", RTN") + budget
        case "base" | "dense":
            return {"base": "no delta", "dense": "the exact difference"}[name]
        case "whole":
            return f"whole model, int{way['bits']} per " + ("128" if way.get("group") else "output")
        case "dare":
            return "DARE" + budget
    return name + budget


def rank(way: Way) -> tuple[Any, ...]:
    """Where a way stands in a table."""
    return (
        ORDER.index(way["codec"]),
        way.get("base", ""),
        bool(way.get("distill")),
        way.get("calibrate") is not False,
        SCALES.index(way.get("scale")),
        way.get("mask_rows", 0),
        -way.get("budget", 0),
        way.get("ratio", 0),
        way.get("bits", 0),
        way.get("group", 0),
    )


def plain(finetunes: Mapping[str, Mapping[str, Cell]]) -> dict[str, dict[str, Cell]]:
    """Way -> fine-tune -> records, over the base as it is."""
    found: dict[str, dict[str, Cell]] = {}
    for finetune, cells in finetunes.items():
        for name, cell in cells.items():
            if cell.way["codec"] not in ENDS and "base" not in cell.way:
                found.setdefault(name, {})[finetune] = cell
    return dict(sorted(found.items(), key=lambda item: rank(next(iter(item[1].values())).way)))


def full(finetunes: Mapping[str, Mapping[str, Cell]]) -> list[str]:
    """Those that are no adapters: an adapter is stored as it is, and not every way was tried on it."""
    return [name for name, cells in finetunes.items() if "lora" not in cells]


def gains(finetunes: Mapping[str, Mapping[str, Cell]]) -> str:
    """Ways by fine-tunes: gain kept; its mean and the worst without adapters."""
    names, judged = list(finetunes), full(finetunes)
    rows = [("way", "bits per weight", "times smaller", *names, "mean", "worst")]
    for way, cells in plain(finetunes).items():
        means = [m for name in judged if name in cells and (m := cells[name].mean("gain_kept")) is not None]
        whole = len(means) == len(judged)
        sized = [cells[name] for name in judged if name in cells] or list(cells.values())
        rows.append(
            (
                way,
                _over(sized, "linear_bits_per_weight", ".2f"),
                _over(sized, "ratio", ".1f"),
                *(cells[name].shown("gain_kept") if name in cells else "" for name in names),
                f"{fmean(means):.3f}" if whole else "",
                f"{min(means):.3f}" if whole else "",
            )
        )
    return _markdown(rows)


def quantised(finetunes: Mapping[str, Mapping[str, Cell]]) -> str | None:
    """Gain kept over quantised bases, by way and fine-tune; None where there are none."""
    names = list(finetunes)
    every = {_named(c.way): c.way for cells in finetunes.values() for c in cells.values() if "base" in c.way}
    rows: list[tuple[str, ...]] = []
    for name, way in sorted(every.items(), key=lambda item: (item[1]["base"], rank(item[1]))):
        found = [finetunes[finetune].get(name) for finetune in names]
        rows.append((way["base"], title(way), *(c.shown("gain_kept") if c else "" for c in found)))
    return _markdown([("base", "way", *names), *rows]) if rows else None


def details(cells: Mapping[str, Cell]) -> str:
    """Every figure of one fine-tune."""
    metric = next(iter(cells.values())).records[0]["metric"]
    rows: list[tuple[str, ...]] = [
        ("way", "base", "bytes", "times smaller", "bits per weight", METRICS[metric], "KL", "top-1", "gain kept")
    ]
    for cell in cells.values():
        sizes = ("", "", "")
        if (count := cell.mean("nbytes")) is not None:
            bits = f"{cell.mean('linear_bits_per_weight'):.3f}"
            sizes = (f"{count:,.0f}", f"{cell.mean('ratio'):.2f}", bits)
        scores = [cell.shown("score", key, digits=n) for key, n in ((metric, 3), ("kl", 4), ("top1", 3))]
        rows.append((title(cell.way), cell.way.get("base", ""), *sizes, *scores, cell.shown("gain_kept")))
    return _markdown(rows)


def _over(cells: Iterable[Cell], key: str, form: str) -> str:
    """From the least to the largest over fine-tunes, where they differ."""
    means = [m for cell in cells if (m := cell.mean(key)) is not None]
    return " to ".join(dict.fromkeys((format(min(means), form), format(max(means), form))))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--details", action="store_true")
    args = parser.parse_args()
    for models, finetunes in bases(args.results.read_text().splitlines()).items():
        print(f"### A {models}\n\n{gains(finetunes)}\n")
        if (over := quantised(finetunes)) is not None:
            print(f"#### Over quantised bases\n\n{over}\n")
        if args.details:
            print("\n".join(f"#### {name}\n\n{details(cells)}\n" for name, cells in finetunes.items()))


if __name__ == "__main__":
    main()
