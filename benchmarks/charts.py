"""Line charts as SVG, in little code: no plotting library is needed to make the documentation's figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 72, 190, 44, 56
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989", "#0a7f8c")
DASHES = ("", "6 4", "2 3")
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. `dash` picks a stroke: 0 solid, 1 dashed, 2 dotted (floors and limits)."""

    name: str
    points: Sequence[Point]
    dash: int = 0
    worst: Sequence[float] = ()
    """Of each point, where it is a mean: how low a bar reaches from it"""
    spread: Sequence[tuple[float, float]] = ()
    """Of each point, where it was measured several times: the least and the largest"""


@dataclass(frozen=True)
class Chart:
    """What stands where; logarithmic axes need positive values."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.svg())
        return path

    def svg(self) -> str:
        points = [p for s in self.series for p in s.points]
        points += [(x, low) for s in self.series for (x, _), low in zip(s.points, s.worst, strict=bool(s.worst))]
        points += [(x, y) for s in self.series for (x, _), ends in zip(s.points, s.spread, strict=False) for y in ends]
        assert points, f"{self.title}: nothing to draw"
        to_x, x_ticks = _axis([p[0] for p in points], self.log_x, LEFT, WIDTH - RIGHT)
        to_y, y_ticks = _axis([p[1] for p in points], self.log_y, HEIGHT - BOTTOM, TOP)
        body = [_grid(to_x, to_y, x_ticks, y_ticks), _labels(self)]
        body += [_line(s, COLORS[i % len(COLORS)], to_x, to_y) for i, s in enumerate(self.series)]
        body += [_legend(s, i) for i, s in enumerate(self.series)]
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
        return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *body, "</svg>\n"])


def _axis(
    values: Sequence[float], log: bool, start: float, stop: float
) -> tuple[Callable[[float], float], list[float]]:
    """From a value to a coordinate, and the ticks."""
    assert not log or min(values) > 0, "a logarithmic axis needs positive values"
    ticks = _log_ticks(min(values), max(values)) if log else _ticks(min(0.0, *values), max(values))
    scale = math.log if log else float
    low, high = scale(min(ticks[0], *values)), scale(max(ticks[-1], *values))
    return lambda v: start + (scale(v) - low) / ((high - low) or 1.0) * (stop - start), ticks


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers that cover the range."""
    raw = (high - low or 1.0) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of two while they are few, else 1, 2 and 5 times powers of ten, else powers of ten."""
    twos = [2.0**e for e in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)]
    if len(twos) <= 9:
        return twos
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    mantissas = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [m * 10.0**e for e in powers for m in mantissas]


def _grid(to_x: Callable[[float], float], to_y: Callable[[float], float], xs: list[float], ys: list[float]) -> str:
    lines = []
    for v in xs:
        x = to_x(v)
        lines.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#e6e6e6"/>')
        lines.append(_text(x, HEIGHT - BOTTOM + 18, _number(v), anchor="middle"))
    for v in ys:
        y = to_y(v)
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#e6e6e6"/>')
        lines.append(_text(LEFT - 8, y + 4, _number(v), anchor="end"))
    return "\n".join(lines)


def _labels(chart: Chart) -> str:
    middle, center = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    upright = f'<g transform="rotate(-90 18 {center})">{_text(18, center, chart.y, anchor="middle")}</g>'
    title = _text(LEFT, 24, chart.title, size=15, weight="bold")
    return "\n".join([title, _text(middle, HEIGHT - 14, chart.x, anchor="middle"), upright])


def _line(series: Series, color: str, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> str:
    at = [(to_x(x), to_y(y)) for x, y in sorted(series.points)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dash = f' stroke-dasharray="{DASHES[series.dash]}"' if series.dash else ""
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in at if not series.dash or series.worst
    )
    bars = "".join(
        f'<path d="M{to_x(x):.1f} {to_y(y):.1f}V{to_y(low):.1f}" stroke="{color}" stroke-width="3" opacity="0.3"/>'
        for (x, y), low in zip(series.points, series.worst, strict=bool(series.worst))
    )
    bars += "".join(
        f'<path d="M{to_x(x):.1f} {to_y(low):.1f}V{to_y(high):.1f}M{to_x(x) - 4:.1f} {to_y(low):.1f}h8'
        f'M{to_x(x) - 4:.1f} {to_y(high):.1f}h8" stroke="{color}" fill="none"/>'
        for (x, _), (low, high) in zip(series.points, series.spread, strict=bool(series.spread))
    )
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>{dots}{bars}'


def _legend(series: Series, i: int) -> str:
    x, y, color = WIDTH - RIGHT + 14, TOP + 14 + 20 * i, COLORS[i % len(COLORS)]
    dash = f' stroke-dasharray="{DASHES[series.dash]}"' if series.dash else ""
    mark = f'<line x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}" stroke="{color}" stroke-width="2"{dash}/>'
    return mark + _text(x + 28, y, series.name)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="#24292f"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{value:g}"
