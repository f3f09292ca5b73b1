"""Gain kept against bits per weight, one curve per codec: benchmarks/fidelity_plot.py [RESULTS.jsonl]

One figure for each base. A point is the mean over the fine-tunes and seeds; a pale bar reaches down to the worst
fine-tune, a thin one shows the least and the largest seed. Bits count every byte of the linears' parts. Ways that one
of the base's fine-tunes or its seeds lacks are left out, as are adapters, and bases without a curve of three points.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from charts import Chart, Series
from fidelity_table import RESULTS, Cell, Models, Way, bases, full, plain

FIGURES = RESULTS.parents[2] / "docs" / "figures"
PRODUCT = ("auto", "bitdelta", "deltadq")
LEAST = 3
"""Points of a base's longest curve"""
LOWEST = -0.2
"""What falls below is drawn here: a variant can be far worse than its base."""


def series(way: Way) -> str | None:
    """Which curve a way belongs to; None: none."""
    match way["codec"]:
        case "auto":
            return "auto" + (", data-free" if way.get("calibrate") is False else "") + _trained(way)
        case "deltadq":
            return "deltadq" + (f", masks of {way['mask_rows']}" if way["mask_rows"] > 1 else "")
        case "bitdelta":
            return f"bitdelta, {way['scale']}{_trained(way)}"
        case "delta-come":
            return "Delta-CoMe, GPTQ" if way.get("calibrate") else "Delta-CoMe, RTN"
        case "dare":
            return "DARE, seeded"
        case "low-rank" | "magnitude":
            return way["codec"]
        case "whole":
            return "whole model, RTN" if way.get("group") else None
    return None


def curves(finetunes: Mapping[str, Mapping[str, Cell]]) -> dict[str, Series]:
    """Curve -> its points, in order of bits."""
    found: dict[str, list[tuple[tuple[float, float], float, tuple[float, float]]]] = {}
    judged = full(finetunes)
    for cells in plain({name: finetunes[name] for name in judged}).values():
        name = series(next(iter(cells.values())).way)
        gains = [cell.values("gain_kept") for cell in cells.values()]
        if name is None or len(cells) < len(judged) or not gains[0] or len(set(map(len, gains))) > 1:
            continue
        bits = fmean(fmean(cell.values("linear_bits_per_weight")) for cell in cells.values())
        seeds = [_shown(fmean(values)) for values in zip(*gains, strict=True)]
        worst = _shown(min(map(fmean, gains)))
        found.setdefault(name, []).append(((bits, fmean(seeds)), worst, (min(seeds), max(seeds))))
    result = {}
    for name, points in sorted(found.items(), key=lambda item: (not item[0].startswith(PRODUCT), item[0])):
        points.sort()
        own, worst, spread = zip(*points, strict=True)
        result[name] = Series(name, own, dash=int(not name.startswith(PRODUCT)), worst=worst, spread=spread)
    return result


def chart(models: Models, finetunes: Mapping[str, Mapping[str, Cell]]) -> Chart:
    title = f"Gain kept, {models}, {len(full(finetunes))} fine-tunes"
    return Chart(title, "bits per weight of the linears", "gain kept", list(curves(finetunes).values()), log_x=True)


def _trained(way: Way) -> str:
    return ", trained" if way.get("distill") else ""


def _shown(gain: float) -> float:
    return max(gain, LOWEST)


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    found = bases(results.read_text().splitlines())
    smallest = min(found)
    for models, finetunes in found.items():
        if max(len(curve.points) for curve in curves(finetunes).values()) < LEAST:
            continue
        size = () if models == smallest else (f"{models.parameters / 1e6:.0f}m", *models.label.replace(",", "").split())
        chart(models, finetunes).write(FIGURES / f"{'-'.join(('fidelity', *size))}.svg")


if __name__ == "__main__":
    main()
