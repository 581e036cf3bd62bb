"""Curves over epochs as SVG text: means as lines, seeds as a band, names at the ends of the lines.

Colours, dashes and fonts come from the page's style sheet. Charts are drawn at about the width of a phone and set side
by side where there is room, so that their text has the same size everywhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from redistill.report.groups import Look
from redistill.report.markup import text

__all__ = ["MOST_NAMED", "Curve", "Scale", "lines", "nice_ticks"]

WIDTH, HEIGHT = 330, 190
LEFT, TOP, BOTTOM = 36, 10, 24
# Width of a letter and height of a line of labels, in units of the drawing.
LETTER, LABEL = 6.4, 12.0
LONGEST = 20
# Curves that have room for their names beside each other.
MOST_NAMED = 14


@dataclass(frozen=True)
class Curve:
    """Values over epochs, one or several at each: the mean is drawn, the range shaded."""

    name: str
    points: Sequence[tuple[float, Sequence[float]]]
    look: Look

    @property
    def means(self) -> list[tuple[float, float]]:
        return [(epoch, statistics.fmean(values)) for epoch, values in self.points]


@dataclass(frozen=True)
class Scale:
    """Numbers from low to high onto places from start to stop."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, number: float) -> float:
        if self.high <= self.low:
            return (self.start + self.stop) / 2
        return self.start + (self.stop - self.start) * (number - self.low) / (self.high - self.low)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if high - low < 1e-6 * max(abs(low), abs(high), 1e-6):
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [round(step * k, 15) for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def lines(title: str, curves: Sequence[Curve], *, percent: bool = False) -> str:
    """A chart of these curves; nothing when there is nothing to draw."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    values = [value for curve in curves for _, many in curve.points for value in many]
    epochs = [epoch for curve in curves for epoch, _ in curve.points]
    ticks = nice_ticks(min(values), max(values))
    named = len(curves) <= MOST_NAMED
    longest = max(min(len(curve.name), LONGEST) for curve in curves) if named else 0
    x = Scale(min(epochs), max(epochs), LEFT, WIDTH - 12 - LETTER * longest)
    y = Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">',
        *axes(x, y, ticks, percent),
        *(band(curve, x, y) for curve in curves),
        *(stroke(curve, x, y) for curve in curves),
        *(labels(curves, x, y) if named else ()),
    ]
    return "".join([*parts, "</svg>"])


def axes(x: Scale, y: Scale, ticks: Sequence[float], percent: bool) -> list[str]:
    parts = []
    for tick in ticks:
        shown = f"{100 * tick:g}%" if percent else f"{tick:g}"
        parts.append(f'<path class="grid" d="M{x.start:.1f} {y(tick):.1f}H{x.stop:.1f}"/>')
        parts.append(f'<text class="tick end" x="{x.start - 5:.1f}" y="{y(tick) + 3.5:.1f}">{shown}</text>')
    for epoch in sorted({x.low, (x.low + x.high) // 2, x.high}):
        shown = f"epoch {epoch:g}" if epoch == x.high else f"{epoch:g}"
        parts.append(f'<text class="tick middle" x="{x(epoch):.1f}" y="{HEIGHT - 8}">{shown}</text>')
    return parts


def band(curve: Curve, x: Scale, y: Scale) -> str:
    """From the lowest to the highest seed."""
    if len(curve.points) < 2 or all(len(many) == 1 for _, many in curve.points):
        return ""
    above = [f"{x(epoch):.1f},{y(max(many)):.1f}" for epoch, many in curve.points]
    below = [f"{x(epoch):.1f},{y(min(many)):.1f}" for epoch, many in reversed(curve.points)]
    return f'<polygon class="band {curve.look}" points="{" ".join(above + below)}"/>'


def stroke(curve: Curve, x: Scale, y: Scale) -> str:
    if len(curve.points) == 1:
        ((epoch, mean),) = curve.means
        return f'<circle class="dot {curve.look}" cx="{x(epoch):.1f}" cy="{y(mean):.1f}" r="3"/>'
    path = " ".join(f"{x(epoch):.1f},{y(mean):.1f}" for epoch, mean in curve.means)
    return f'<polyline class="curve {curve.look}" points="{path}"/>'


def labels(curves: Sequence[Curve], x: Scale, y: Scale) -> list[str]:
    """The name of each curve beside its end, as near as its neighbours allow."""
    ends = sorted((y(curve.means[-1][1]), at) for at, curve in enumerate(curves))
    parts = []
    for place, (_, at) in zip(apart([end for end, _ in ends], TOP, HEIGHT - BOTTOM), ends, strict=True):
        name = curves[at].name
        shown = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        parts.append(
            f'<text class="label c{curves[at].look.colour % 8}" x="{x.stop + 6:.1f}" y="{place + 3.5:.1f}">'
            f"<title>{text(name)}</title>{text(shown)}</text>"
        )
    return parts


def apart(places: Sequence[float], top: float, bottom: float) -> list[float]:
    """Sorted places, moved as far as needed to lie a label's height apart between top and bottom."""
    gap = min(LABEL, (bottom - top) / max(len(places) - 1, 1))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else max(place, top))
    limit = bottom
    for at in reversed(range(len(moved))):
        moved[at] = min(moved[at], limit)
        limit = moved[at] - gap
    return moved
