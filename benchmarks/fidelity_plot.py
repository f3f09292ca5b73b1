"""Gain kept against bits per weight, one curve per codec: benchmarks/fidelity_plot.py [RESULTS.jsonl] [OUT.svg]

Each point is the mean over the fine-tunes that have it; a bar reaches down to the worst of them. Both axes count every
byte of the linears' parts. The fine-tunes are those that every point of `auto` has; ways that lack one are left out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from fidelity_table import RESULTS, latest

OUT = RESULTS.parents[2] / "docs" / "fidelity.svg"
COLOURS = ("#0b6e4f", "#c1440e", "#2a5ea8", "#8a5a9e", "#7a7a7a", "#b8860b")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 60, 200, 20, 50
TICKS = (0.0625, 0.125, 0.25, 0.5, 1, 2, 4)
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


def draw(found: Mapping[str, Curve]) -> str:
    low, high = math.log2(TICKS[0]), math.log2(TICKS[-1])

    def x(bits: float) -> float:
        return LEFT + (math.log2(bits) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(gain: float) -> float:
        return TOP + (1 - max(0.0, gain)) / 1.05 * (HEIGHT - TOP - BOTTOM) + 8

    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">']
    lines += [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']
    lines += list(_axes(x, y))
    for (name, points), colour, place in zip(found.items(), COLOURS, range(len(COLOURS)), strict=False):
        path = " ".join(f"{x(bits):.1f},{y(mean):.1f}" for bits, mean, _ in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for bits, mean, worst in points:
            lines.append(f'<path d="M{x(bits):.1f} {y(mean):.1f}V{y(worst):.1f}" stroke="{colour}" opacity=".4"/>')
            lines.append(f'<circle cx="{x(bits):.1f}" cy="{y(mean):.1f}" r="3.5" fill="{colour}"/>')
        at = TOP + 14 + 20 * place
        lines.append(f'<text x="{WIDTH - RIGHT + 18}" y="{at}" font-size="13" fill="{colour}">{name}</text>')
    return "\n".join([*lines, "</svg>\n"])


def _axes(x: Any, y: Any) -> Iterator[str]:
    for gain in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        yield f'<path d="M{LEFT} {y(gain):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        yield f'<text x="{LEFT - 8}" y="{y(gain) + 4:.1f}" font-size="12" text-anchor="end">{gain:g}</text>'
    for bits in TICKS:
        yield f'<text x="{x(bits):.1f}" y="{HEIGHT - BOTTOM + 28}" font-size="12" text-anchor="middle">{bits:g}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = "bits per weight of the linears"
    yield f'<text x="{middle}" y="{HEIGHT - 6}" font-size="13" text-anchor="middle">{label}</text>'
    yield f'<text x="14" y="{HEIGHT / 2}" font-size="13" transform="rotate(-90 14 {HEIGHT / 2})">gain kept</text>'


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    (Path(sys.argv[2]) if len(sys.argv) > 2 else OUT).write_text(draw(curves(results.read_text())))


if __name__ == "__main__":
    main()
