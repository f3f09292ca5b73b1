"""Gain kept against bits per weight, one curve per codec: benchmarks/fidelity_plot.py [RESULTS.jsonl] [OUT.svg]

Each point is the mean over the fine-tunes that have it; a bar reaches down to the worst of them. Both axes count every
byte of the linears' parts. The fine-tunes are those that every point of `auto` has; ways that lack one are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from charts import Chart, Series
from fidelity_table import RESULTS, latest

OUT = RESULTS.parents[2] / "docs" / "figures" / "fidelity.svg"
Curve = list[tuple[float, float, float]]
"""(bits per weight, mean gain, worst gain)"""


def series(way: Mapping[str, Any]) -> str | None:
    """Which curve a way belongs to; None: none."""
    trained = ", trained" if way.get("distill") else ""
    match way["codec"]:
        case "auto":
            return "auto" + (", data-free" if way.get("calibrate") is False else "") + trained
        case "deltadq":
            return f"deltadq, masks of {way['mask_rows']}"
        case "bitdelta":
            return f"bitdelta, {way['scale']}{trained}"
    return None


def curves(results: str) -> dict[str, Curve]:
    """Series -> points in order of bits, of the ways that every fine-tune of the comparison has."""
    by_way: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for finetune, records in latest(results.splitlines()).items():
        for record in records:
            name = series(record["way"])
            if name is not None and record["gain_kept"] is not None:
                point = record["linear_bits_per_weight"], record["gain_kept"]
                by_way.setdefault((name, str(record["way"])), {})[finetune] = point
    shared = set.intersection(*(set(points) for (name, _), points in by_way.items() if name == "auto"))
    found: dict[str, Curve] = {}
    for (name, _), points in by_way.items():
        if shared <= set(points):
            bits, gains = zip(*(points[finetune] for finetune in sorted(shared)), strict=True)
            found.setdefault(name, []).append((fmean(bits), fmean(gains), min(gains)))
    return {name: sorted(points) for name, points in sorted(found.items())}


def chart(found: Mapping[str, Curve]) -> Chart:
    """Means as lines, the worst fine-tune as bars."""
    lines = [
        Series(name, [(bits, mean) for bits, mean, _ in points], worst=[low for _, _, low in points])
        for name, points in found.items()
    ]
    return Chart("Gain kept", "bits per weight of the linears", "gain kept, mean and worst", lines, log_x=True)


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    chart(curves(results.read_text())).write(Path(sys.argv[2]) if len(sys.argv) > 2 else OUT)


if __name__ == "__main__":
    main()
