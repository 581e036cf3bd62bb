"""Small diagrams as SVG text: seeds on a line, reliability, accuracy by class, a histogram over powers of ten."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from redistill.calibration import Bin
from redistill.report.charts import Scale
from redistill.report.groups import Group, Look
from redistill.report.markup import text

__all__ = ["class_dots", "histogram", "reliability", "seeds"]

BINS_PER_DECADE = 4
# Powers of ten that are named below a histogram, at most.
DECADE_LABELS = 8


def seeds(values: Sequence[float], low: float, high: float, look: Look) -> str:
    """Every seed as a dot between low and high, the mean as a line."""
    if not values:
        return ""
    x = Scale(low, high, 5, 115)
    dots = "".join(f'<circle class="dot {look}" cx="{x(value):.1f}" cy="8" r="3"/>' for value in values)
    mean = f'<path class="mean" d="M{x(statistics.fmean(values)):.1f} 1V15"/>'
    return f'<svg class="seeds" viewBox="0 0 120 16" role="img" aria-label="every seed">{mean}{dots}</svg>'


def reliability(name: str, bins: Sequence[Bin], look: Look) -> str:
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
