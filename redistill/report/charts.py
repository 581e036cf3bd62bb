"""Small charts as SVG text: lines with their spread, reliability diagrams, histograms. Colours come from the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Line", "bars", "lines", "reliability"]

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 130, 12, 30
COLOURS = 8


@dataclass(frozen=True)
class Line:
    """A curve over epochs: several values at each, of which the mean is drawn and the range shaded."""

    name: str
    points: Sequence[tuple[float, Sequence[float]]]
    colour: int


def lines(title: str, curves: Sequence[Line], *, percent: bool = False) -> str:
    """Curves with their names at their ends; nothing when there is nothing to draw."""
    curves = [curve for curve in curves if curve.points]
    values = [v for curve in curves for _, many in curve.points for v in many if math.isfinite(v)]
    if not values:
        return ""
    ticks = nice_ticks(min(values), max(values))
    low, high = min(ticks[0], min(values)), max(ticks[-1], max(values))
    epochs = [x for curve in curves for x, _ in curve.points]
    first, last = min(epochs), max(epochs)

    def x(epoch: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((epoch - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        text = f"{tick:.0%}" if percent else f"{tick:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    for epoch in sorted({first, round((first + last) / 2), last}):
        parts.append(f'<text class="tick" x="{x(epoch):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{epoch:g}</text>')
    for curve in curves:
        parts += [shade(curve, x, y), stroke(curve, x, y)]
    parts += labels(curves, x, y)
    return "".join([*parts, "</svg>"])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def shade(curve: Line, x, y) -> str:  # type: ignore[no-untyped-def]  # noqa: ANN001  the two scales
    above = [f"{x(e):.1f},{y(max(many)):.1f}" for e, many in curve.points]
    below = [f"{x(e):.1f},{y(min(many)):.1f}" for e, many in reversed(curve.points)]
    return f'<polygon class="band c{curve.colour % COLOURS}" points="{" ".join(above + below)}"/>'


def stroke(curve: Line, x, y) -> str:  # type: ignore[no-untyped-def]  # noqa: ANN001  the two scales
    path = " ".join(f"{x(e):.1f},{y(mean(many)):.1f}" for e, many in curve.points)
    if len(curve.points) == 1:
        epoch, many = curve.points[0]
        return f'<circle class="dot c{curve.colour % COLOURS}" cx="{x(epoch):.1f}" cy="{y(mean(many)):.1f}" r="3"/>'
    return f'<polyline class="curve c{curve.colour % COLOURS}" points="{path}"/>'


def labels(curves: Sequence[Line], x, y) -> list[str]:  # type: ignore[no-untyped-def]  # noqa: ANN001  the two scales
    """The name of each curve beside its end, moved apart where they would overlap."""
    ends = sorted((y(mean(curve.points[-1][1])), i) for i, curve in enumerate(curves))
    places: list[float] = []
    for at, _ in ends:
        places.append(max(at, places[-1] + 15) if places else at)
    excess = max(0.0, places[-1] - (HEIGHT - BOTTOM)) if places else 0.0
    parts = []
    for place, (_, i) in zip(places, ends, strict=True):
        curve = curves[i]
        at = x(curve.points[-1][0]) + 8
        name = curve.name if len(curve.name) <= 20 else f"{curve.name[:19]}…"
        where = f'x="{at:.1f}" y="{place - excess + 4:.1f}"'
        parts.append(f'<text class="label c{curve.colour % COLOURS}" {where}>{escape(name)}</text>')
    return parts


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover low to high."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw)
    start = math.floor(low / step)
    return [round(step * k, 12) for k in range(start, math.ceil(high / step) + 1)]


def reliability(name: str, bins: Sequence[tuple[float, float, int, float | None, float | None]], colour: int) -> str:
    """(low, high, rows, confidence, accuracy) per bin: bars of accuracy, the diagonal of perfect calibration."""
    side, edge = 170, 24
    most = max((rows for _, _, rows, _, _ in bins), default=0)

    def at(value: float) -> float:
        return edge + (side - 2 * edge) * value

    parts = [f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="reliability of {escape(name)}">']
    for low, high, rows, _, accuracy in bins:
        if not rows or accuracy is None:
            continue
        weight = 0.35 + 0.65 * math.sqrt(rows / most)
        width, height = at(high) - at(low) - 1, at(accuracy) - at(0)
        parts.append(
            f'<rect class="fill c{colour % COLOURS}" opacity="{weight:.2f}" x="{at(low):.1f}" '
            f'y="{side - at(accuracy):.1f}" width="{width:.1f}" height="{height:.1f}"/>'
        )
    parts.append(f'<line class="axis" x1="{at(0)}" y1="{side - at(0)}" x2="{at(1)}" y2="{side - at(1)}"/>')
    for value in (0, 1):
        parts.append(f'<text class="tick" x="{at(value)}" y="{side - 8}" text-anchor="middle">{value}</text>')
    parts.append(f'<text class="tick" x="{side / 2}" y="{side - 8}" text-anchor="middle">confidence</text>')
    return "".join([*parts, "</svg>"])


def bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    """A histogram: labels below, heights as they are."""
    width, height, foot = 560, 150, 34
    most = max((value for _, value in values), default=0.0)
    if not most:
        return ""
    step = width / len(values)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">']
    for i, (name, value) in enumerate(values):
        tall = (height - foot - 8) * value / most
        parts.append(
            f'<rect class="fill c0" x="{i * step + 1:.1f}" y="{height - foot - tall:.1f}" '
            f'width="{step - 2:.1f}" height="{tall:.1f}"/>'
        )
        if i % max(1, len(values) // 8) == 0:
            middle = (i + 0.5) * step
            parts.append(
                f'<text class="tick" x="{middle:.1f}" y="{height - 14}" text-anchor="middle">{escape(name)}</text>'
            )
    return "".join([*parts, "</svg>"])
