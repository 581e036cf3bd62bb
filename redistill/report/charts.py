"""Curves over epochs as SVG text: means as lines, seeds as a band, names at the ends of the lines.

Colours, dashes and fonts come from the page's style sheet. Charts are drawn at about the width of a phone and set side
by side where there is room, so that their text has the same size everywhere.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from redistill.metrics import Bin
from redistill.report.markup import text
from redistill.report.runs import Group, LineStyle

__all__ = ["MOST_NAMED", "Curve", "Scale", "class_dots", "histogram", "lines", "nice_ticks", "reliability", "seeds"]

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
    look: LineStyle

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


# -- diagrams ---------------------------------------------------------------------------------------------------------
#
# Small diagrams as SVG text: seeds on a line, reliability, accuracy by class, a histogram over powers of ten.

BINS_PER_DECADE = 4
# Powers of ten that are named below a histogram, at most.
DECADE_LABELS = 8


def seeds(values: Sequence[float], low: float, high: float, look: LineStyle) -> str:
    """Every seed as a dot between low and high, the mean as a line."""
    if not values:
        return ""
    x = Scale(low, high, 5, 115)
    dots = "".join(f'<circle class="dot {look}" cx="{x(value):.1f}" cy="8" r="3"/>' for value in values)
    mean = f'<path class="mean" d="M{x(statistics.fmean(values)):.1f} 1V15"/>'
    return f'<svg class="seeds" viewBox="0 0 120 16" role="img" aria-label="every seed">{mean}{dots}</svg>'


def reliability(name: str, bins: Sequence[Bin], look: LineStyle) -> str:
    """Bars of accuracy by confidence under the diagonal of perfect calibration; below, how many images each holds."""
    x, y, foot = Scale(0, 1, 26, 146), Scale(0, 1, 130, 10), Scale(0, 1, 134, 154)
    most = max((item.rows for item in bins), default=0)
    parts = [f'<svg class="chart" viewBox="0 0 156 178" role="img" aria-label="reliability of {text(name)}">']
    for tick in (0.0, 0.5, 1.0):
        parts.append(f'<path class="grid" d="M{x.start} {y(tick):.1f}H{x.stop}"/>')
        parts.append(f'<text class="tick end" x="22" y="{y(tick) + 3.5:.1f}">{tick:g}</text>')
    for item in bins:
        if not item.rows or item.accuracy is None:
            continue
        left, width = x(item.low) + 0.5, x(item.high) - x(item.low) - 1
        for kind, top, height in (
            (f"fill {look}", y(item.accuracy), y(0) - y(item.accuracy)),
            ("count", foot.start, foot(item.rows / most) - foot.start),
        ):
            parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
            )
    parts.append(f'<path class="axis" d="M{x(0)} {y(0)}L{x(1)} {y(1)}"/>')
    for place, kind, said in ((x(0), "start", "0"), (86, "middle", "confidence"), (x(1), "end", "1")):
        parts.append(f'<text class="tick {kind}" x="{place}" y="168">{said}</text>')
    return "".join([*parts, "</svg>"])


def class_dots(names: Sequence[str], groups: Sequence[Group], rows: Sequence[int], against: tuple[int, int]) -> str:
    """Accuracy of every group for these classes, and by how many points the second of `against` leads the first."""
    width, line, left, right = 330, 17, 78, 36
    accuracy = [group.per_class() for group in groups]
    height = 24 + line * len(rows)
    x = Scale(0, 1, left, width - right)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="accuracy by class">']
    for tick in (0.0, 0.5, 1.0):
        parts.append(f'<path class="grid" d="M{x(tick):.1f} 16V{height}"/>')
        parts.append(f'<text class="tick middle" x="{x(tick):.1f}" y="10">{100 * tick:g}%</text>')
    for at, k in enumerate(rows):
        y = 24 + line * at + line / 2 - 4
        found = [(of[k], group.look) for of, group in zip(accuracy, groups, strict=True) if k in of]
        name = names[at] if len(names[at]) <= 13 else f"{names[at][:12]}…"
        title = f"<title>{text(names[at])}</title>"
        parts.append(f'<text class="tick" x="0" y="{y + 3.5:.1f}">{title}{text(name)}</text>')
        ends = [x(value) for value, _ in found]
        parts.append(f'<path class="range" d="M{min(ends):.1f} {y:.1f}H{max(ends):.1f}"/>')
        for value, look in found:
            parts.append(f'<circle class="dot {look}" cx="{x(value):.1f}" cy="{y:.1f}" r="3.5"/>')
        base, other = accuracy[against[0]].get(k), accuracy[against[1]].get(k)
        if against[0] != against[1] and base is not None and other is not None:
            # A minus as wide as the plus.
            lead = f"{100 * (other - base):+.0f}".replace("-", "−")
            parts.append(f'<text class="tick end strong" x="{width}" y="{y + 3.5:.1f}">{lead}</text>')
    return "".join([*parts, "</svg>"])


def histogram(title: str, counts: Mapping[int, int], *, mark: float | None = None) -> str:
    """Counts by quarter of a power of ten, keys being the number of the quarter; `mark` is a limit to be shown."""
    if not counts:
        return ""
    width, height, foot = 330, 110, 20
    last = max(counts) if mark is None else max(max(counts), math.floor(math.log10(mark) * BINS_PER_DECADE) + 1)
    first = math.floor(min(counts) / BINS_PER_DECADE) * BINS_PER_DECADE
    x, y = Scale(first, last + 1, 6, width - 6), Scale(0, max(counts.values()), height - foot, 16)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}">']
    for bin_, count in sorted(counts.items()):
        box = f'x="{x(bin_) + 0.5:.1f}" y="{y(count):.1f}" width="{x(bin_ + 1) - x(bin_) - 1:.1f}"'
        parts.append(f'<rect class="fill c0" {box} height="{y(0) - y(count):.1f}"/>')
    decades = range(first // BINS_PER_DECADE, (last + 1) // BINS_PER_DECADE + 1)
    for decade in decades[:: math.ceil(len(decades) / DECADE_LABELS)]:
        place = min(max(x(decade * BINS_PER_DECADE), 14), width - 14)
        parts.append(f'<text class="tick middle" x="{place:.1f}" y="{height - 6}">1e{decade}</text>')
    parts.append(f'<path class="axis-line" d="M{x.start} {y(0):.1f}H{x.stop}"/>')
    if mark is not None:
        at = x(math.log10(mark) * BINS_PER_DECADE)
        parts.append(f'<path class="axis" d="M{at:.1f} 14V{y(0):.1f}"/>')
        parts.append(f'<text class="tick end" x="{min(at + 18, width):.1f}" y="10">bound {mark:g}</text>')
    return "".join([*parts, "</svg>"])
