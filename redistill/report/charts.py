"""The charts of a report as SVG text: curves, seeds on a line, reliability, classes, layers, histograms.

Colours, dashes and fonts come from the page's style sheet. Charts are about as wide as a phone and stand side by side
if there is room, so that their text has the same size everywhere. Names are untrusted and must pass `escaped`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from redistill_cache.wording import harmless

from redistill.metrics import Bin
from redistill.report.runs import Group, LineStyle

__all__ = [
    "BINS_PER_DECADE",
    "MAX_LABELLED",
    "Curve",
    "Figure",
    "Scale",
    "Series",
    "class_chart",
    "histogram",
    "line_chart",
    "nice_ticks",
    "reliability_diagram",
    "row_chart",
    "seed_dots",
]

WIDTH, HEIGHT = 330, 190
LEFT, TOP, BOTTOM = 36, 10, 24
# Width of a letter and height of a label, in SVG units.
LETTER, LABEL = 6.4, 12.0
MAX_LABEL = 20  # characters
MAX_CLASS_LABEL = 13
# More curves than this have no room for labels at their ends.
MAX_LABELLED = 14
# Resolution of histograms, and the number of powers of ten labelled below them.
BINS_PER_DECADE = 4
DECADE_LABELS = 8


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and caption; omitted from the page if `drawing` is empty."""

    title: str
    drawing: Markup
    caption: str = ""


def escaped(text: object) -> str:
    return str(escape(harmless(text)))


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def svg(width: int, height: float, label: str, parts: Sequence[str], kind: str = "chart") -> Markup:
    head = f'<svg class="{kind}" viewBox="0 0 {width} {height:g}" role="img" aria-label="{escaped(label)}">'
    return Markup("".join([head, *parts, "</svg>"]))


@dataclass(frozen=True)
class Scale:
    """Maps low..high linearly to the coordinates start..stop."""

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


# -- curves over epochs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One or several values at each epoch: the mean is a line, the range a band."""

    name: str
    points: Sequence[tuple[float, Sequence[float]]]
    style: LineStyle

    @property
    def means(self) -> list[tuple[float, float]]:
        return [(epoch, statistics.fmean(values)) for epoch, values in self.points]


def line_chart(title: str, curves: Sequence[Curve], *, percent: bool = False) -> Markup:
    """Curves on common axes, labelled at their ends; empty when there is nothing to draw."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup()
    values = [value for curve in curves for _, seeds in curve.points for value in seeds]
    epochs = [epoch for curve in curves for epoch, _ in curve.points]
    ticks = nice_ticks(min(values), max(values))
    labelled = len(curves) <= MAX_LABELLED
    longest = max(min(len(curve.name), MAX_LABEL) for curve in curves) if labelled else 0
    x = Scale(min(epochs), max(epochs), LEFT, WIDTH - 12 - LETTER * longest)
    y = Scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        *axes(x, y, ticks, percent),
        *(seed_band(curve, x, y) for curve in curves),
        *(mean_line(curve, x, y) for curve in curves),
        *(curve_labels(curves, x, y) if labelled else ()),
    ]
    return svg(WIDTH, HEIGHT, title, parts)


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


def seed_band(curve: Curve, x: Scale, y: Scale) -> str:
    """The range from the lowest to the highest seed."""
    if len(curve.points) < 2 or all(len(seeds) == 1 for _, seeds in curve.points):
        return ""
    above = [f"{x(epoch):.1f},{y(max(seeds)):.1f}" for epoch, seeds in curve.points]
    below = [f"{x(epoch):.1f},{y(min(seeds)):.1f}" for epoch, seeds in reversed(curve.points)]
    return f'<polygon class="band {curve.style}" points="{" ".join(above + below)}"/>'


def mean_line(curve: Curve, x: Scale, y: Scale) -> str:
    if len(curve.points) == 1:
        ((epoch, mean),) = curve.means
        return f'<circle class="dot {curve.style}" cx="{x(epoch):.1f}" cy="{y(mean):.1f}" r="3"/>'
    path = " ".join(f"{x(epoch):.1f},{y(mean):.1f}" for epoch, mean in curve.means)
    return f'<polyline class="curve {curve.style}" points="{path}"/>'


def curve_labels(curves: Sequence[Curve], x: Scale, y: Scale) -> list[str]:
    """The name of each curve beside its end, moved where labels would overlap."""
    ends = sorted((y(curve.means[-1][1]), k) for k, curve in enumerate(curves))
    parts = []
    for place, (_, k) in zip(without_overlap([end for end, _ in ends], TOP, HEIGHT - BOTTOM), ends, strict=True):
        name, colour = curves[k].name, curves[k].style.colour_class
        parts.append(
            f'<text class="label {colour}" x="{x.stop + 6:.1f}" y="{place + 3.5:.1f}">'
            f"<title>{escaped(name)}</title>{escaped(cut(name, MAX_LABEL))}</text>"
        )
    return parts


def without_overlap(places: Sequence[float], top: float, bottom: float) -> list[float]:
    """Sorted label positions, moved as little as needed to be a label's height apart between top and bottom."""
    gap = min(LABEL, (bottom - top) / max(len(places) - 1, 1))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else max(place, top))
    limit = bottom
    for k in reversed(range(len(moved))):
        moved[k] = min(moved[k], limit)
        limit = moved[k] - gap
    return moved


# -- other charts -----------------------------------------------------------------------------------------------------


def seed_dots(values: Sequence[float], low: float, high: float, style: LineStyle) -> Markup:
    """A dot for every seed between low and high, and a line at the mean."""
    if not values:
        return Markup()
    x = Scale(low, high, 5, 115)
    mean = f'<path class="mean" d="M{x(statistics.fmean(values)):.1f} 1V15"/>'
    dots = [f'<circle class="dot {style}" cx="{x(value):.1f}" cy="8" r="3"/>' for value in values]
    return svg(120, 16, "every seed", [mean, *dots], "seeds")


def reliability_diagram(name: str, bins: Sequence[Bin], style: LineStyle) -> Markup:
    """Accuracy by confidence, with the diagonal of perfect calibration; below, the number of images in each bin."""
    x, y, count = Scale(0, 1, 26, 146), Scale(0, 1, 130, 10), Scale(0, 1, 134, 154)
    most = max((item.rows for item in bins), default=0)
    parts = []
    for tick in (0.0, 0.5, 1.0):
        parts.append(f'<path class="grid" d="M{x.start} {y(tick):.1f}H{x.stop}"/>')
        parts.append(f'<text class="tick end" x="22" y="{y(tick) + 3.5:.1f}">{tick:g}</text>')
    for item in bins:
        if not item.rows or item.accuracy is None:
            continue
        left, width = x(item.low) + 0.5, x(item.high) - x(item.low) - 1
        for kind, top, height in (
            (f"fill {style}", y(item.accuracy), y(0) - y(item.accuracy)),
            ("count", count.start, count(item.rows / most) - count.start),
        ):
            parts.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
            )
    parts.append(f'<path class="axis" d="M{x(0)} {y(0)}L{x(1)} {y(1)}"/>')
    for place, anchor, label in ((x(0), "start", "0"), (86, "middle", "confidence"), (x(1), "end", "1")):
        parts.append(f'<text class="tick {anchor}" x="{place}" y="168">{label}</text>')
    return svg(156, 178, f"reliability diagram of {name}", parts)


def class_chart(names: Sequence[str], groups: Sequence[Group], rows: Sequence[int], pair: tuple[int, int]) -> Markup:
    """Accuracy of every group in the classes `rows`, and the points by which the second of `pair` leads the first."""
    row_height, left, right = 17, 78, 36
    per_class = [group.per_class() for group in groups]
    height = 24 + row_height * len(rows)
    x = Scale(0, 1, left, WIDTH - right)
    parts = []
    for tick in (0.0, 0.5, 1.0):
        parts.append(f'<path class="grid" d="M{x(tick):.1f} 16V{height}"/>')
        parts.append(f'<text class="tick middle" x="{x(tick):.1f}" y="10">{100 * tick:g}%</text>')
    for at, (k, name) in enumerate(zip(rows, names, strict=True)):
        y = 24 + row_height * at + row_height / 2 - 4
        label = f"<title>{escaped(name)}</title>{escaped(cut(name, MAX_CLASS_LABEL))}"
        parts.append(f'<text class="tick" x="0" y="{y + 3.5:.1f}">{label}</text>')
        pairs = zip(per_class, groups, strict=True)
        dots = [(x(accuracy[k]), group.style) for accuracy, group in pairs if k in accuracy]
        ends = [place for place, _ in dots]
        parts.append(f'<path class="range" d="M{min(ends):.1f} {y:.1f}H{max(ends):.1f}"/>')
        parts += [f'<circle class="dot {style}" cx="{place:.1f}" cy="{y:.1f}" r="3.5"/>' for place, style in dots]
        base, best = (per_class[index].get(k) for index in pair)
        if pair[0] != pair[1] and base is not None and best is not None:
            # The typographic minus is as wide as the plus.
            lead = f"{100 * (best - base):+.0f}".replace("-", "−")
            parts.append(f'<text class="tick end strong" x="{WIDTH}" y="{y + 3.5:.1f}">{lead}</text>')
    return svg(WIDTH, height, "accuracy by class", parts)


@dataclass(frozen=True)
class Series:
    """A value for each row of a chart."""

    name: str
    values: Sequence[float]
    style: LineStyle


def row_chart(title: str, names: Sequence[str], series: Sequence[Series]) -> Markup:
    """A row for each name with a dot for each series, and the value of the first series at its end."""
    row_height, right = 17, 36
    left = 8 + LETTER * max(min(len(name), MAX_LABEL) for name in names)
    height = 24 + row_height * len(names)
    ticks = nice_ticks(min(0.0, *(min(item.values) for item in series)), max(max(item.values) for item in series))
    x = Scale(ticks[0], ticks[-1], left, WIDTH - right)
    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{x(tick):.1f} 16V{height}"/>')
        parts.append(f'<text class="tick middle" x="{x(tick):.1f}" y="10">{tick:g}</text>')
    for at, name in enumerate(names):
        y = 24 + row_height * at + row_height / 2 - 4
        label = f"<title>{escaped(name)}</title>{escaped(cut(name, MAX_LABEL))}"
        parts.append(f'<text class="tick" x="0" y="{y + 3.5:.1f}">{label}</text>')
        for item in reversed(series):  # the first on top
            place = x(item.values[at])
            parts.append(f'<circle class="dot {item.style}" cx="{place:.1f}" cy="{y:.1f}" r="3.5"/>')
        shown = f"{series[0].values[at]:.2f}"
        parts.append(f'<text class="tick end strong" x="{WIDTH}" y="{y + 3.5:.1f}">{shown}</text>')
    return svg(WIDTH, height, title, parts)


def histogram(title: str, counts: Mapping[int, int], *, bound: float | None = None) -> Markup:
    """Counts by floor(log10(value) * BINS_PER_DECADE), with a line at `bound`; empty when there is nothing to draw."""
    if not counts:
        return Markup()
    height, foot = 110, 20
    last = max(counts) if bound is None else max(max(counts), math.floor(math.log10(bound) * BINS_PER_DECADE) + 1)
    first = math.floor(min(counts) / BINS_PER_DECADE) * BINS_PER_DECADE
    x, y = Scale(first, last + 1, 6, WIDTH - 6), Scale(0, max(counts.values()), height - foot, 16)
    parts = []
    for index, count in sorted(counts.items()):
        box = f'x="{x(index) + 0.5:.1f}" y="{y(count):.1f}" width="{x(index + 1) - x(index) - 1:.1f}"'
        parts.append(f'<rect class="fill c0" {box} height="{y(0) - y(count):.1f}"/>')
    decades = range(first // BINS_PER_DECADE, (last + 1) // BINS_PER_DECADE + 1)
    for decade in decades[:: math.ceil(len(decades) / DECADE_LABELS)]:
        place = min(max(x(decade * BINS_PER_DECADE), 14), WIDTH - 14)
        parts.append(f'<text class="tick middle" x="{place:.1f}" y="{height - 6}">1e{decade}</text>')
    parts.append(f'<path class="axis-line" d="M{x.start} {y(0):.1f}H{x.stop}"/>')
    if bound is not None:
        place = x(math.log10(bound) * BINS_PER_DECADE)
        parts.append(f'<path class="axis" d="M{place:.1f} 14V{y(0):.1f}"/>')
        parts.append(f'<text class="tick end" x="{min(place + 18, WIDTH):.1f}" y="10">bound {bound:g}</text>')
    return svg(WIDTH, height, title, parts)
