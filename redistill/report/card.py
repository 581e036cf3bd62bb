"""The archive on the page: identity, contents and provenance, its codecs and their errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redistill_cache import Archive
from redistill_cache.codecs.stats import BINS_PER_OCTAVE, LOWEST_OCTAVE, BlockStats
from redistill_cache.inspect import describe, described_recipe, settings_text
from redistill_cache.wording import human_bytes

from redistill.report.charts import BINS_PER_DECADE, Figure, histogram
from redistill.report.runs import Group

__all__ = ["ArchiveCard", "archive_card"]

# Histograms show this many powers of ten below the largest error; smaller errors share the first bar.
DECADES = 6
TEMPERATURES = (1, 4)
FIDELITY_COLUMNS = tuple(f"{kind}, T={t}" for t in TEMPERATURES for kind in ("mean KL", "p99 KL", "max KL"))
FIDELITY_KEYS = tuple(f"{kind}_kl_t{t}" for t in TEMPERATURES for kind in ("mean", "p99", "max"))
CODEC_COLUMNS = ("signal", "codec", "bytes/view", "float16 bytes", *FIDELITY_COLUMNS, "same class %")
NOT_MEASURED = "–"


@dataclass(frozen=True)
class ArchiveCard:
    """What the page shows of an archive, as text."""

    id: str
    images: str
    views: str
    recipe: str
    size: str
    teachers: tuple[tuple[str, str, str], ...]
    """Name, spec, and the start of the digest of the weights, or ""."""
    data: str
    licence: str
    citation: str
    used_by: str
    codec_columns: tuple[str, ...]
    codecs: tuple[tuple[str, ...], ...]
    """A row for each signal."""
    errors: tuple[Figure, ...]


def archive_card(archive: Archive, groups: Sequence[Group]) -> ArchiveCard:
    info = describe(archive)
    excluded = f", {len(info['excluded']):,} excluded" if info["excluded"] else ""
    canaries = info["canaries_per_view"]
    users = [group.name for group in groups if group.runs[0].archive_id == archive.id]
    signals = [(teacher, name) for teacher, signals in info["teachers"].items() for name in signals]
    return ArchiveCard(
        id=str(info["id"]),
        images=f"{info['num_samples']:,}{excluded}, {info['num_classes']:,} classes",
        views=f"{info['num_views']:,} per image, seed {info['seed']}, {canaries or 'no'} canaries per view",
        recipe=described_recipe(info["recipe"]),
        size=f"{human_bytes(info['total_bytes'])} in total, {info['bytes_per_view']:.1f} bytes per view",
        teachers=tuple(
            (name, str(model.get("spec", "not stated")), str(model.get("weights_digest") or "")[:12])
            for name, model in info["models"].items()
        ),
        data=settings_text(info["source"]) or "not stated",
        licence=info["licence"] or "not stated",
        citation=info["citation"] or "not stated",
        used_by="all groups on this page" if len(users) == len(groups) else ", ".join(users) or "no group on this page",
        codec_columns=CODEC_COLUMNS,
        codecs=tuple(codec_row(f"{teacher}, {name}", info["teachers"][teacher][name]) for teacher, name in signals),
        errors=tuple(chart for teacher, name in signals for chart in error_histograms(archive, teacher, name)),
    )


def codec_row(name: str, signal: Mapping[str, Any]) -> tuple[str, ...]:
    fidelity = signal["fidelity"] or {}
    agreement = fidelity.get("top1_agreement")
    return (
        name,
        signal["codec"],
        f"{signal['bytes_per_view']:.1f}",
        f"{2 * signal['width']:,}",
        *(scientific(fidelity.get(key)) for key in FIDELITY_KEYS),
        NOT_MEASURED if agreement is None else f"{100 * agreement:.2f}",
    )


def scientific(number: float | None) -> str:
    if number is None:
        return NOT_MEASURED
    return "0" if number == 0 else f"{number:.1e}".replace("e-0", "e−").replace("e-", "e−")


def error_histograms(archive: Archive, teacher: str, signal: str) -> list[Figure]:
    """Rows by encoding error, from the statistics the writer recorded."""
    stats = archive.state.stats.get(teacher, {}).get(signal)
    if stats is None:
        return []
    errors = BlockStats.from_json(stats).errors
    fidelity = archive.signal(teacher, signal)[1].config.get("fidelity")
    bound = float(fidelity) if isinstance(fidelity, int | float) and fidelity > 0 else None
    figures = []
    for temperature in TEMPERATURES:
        measured = errors.get(f"kl_t{temperature}")
        counts = {} if measured is None else by_quarter_decade(measured.histogram, measured.worst)
        title = f"{teacher}, {signal}: encoding error at T={temperature}"
        figures.append(Figure(title, histogram(title, counts, bound=bound), "rows of all views by KL"))
    return figures


def by_quarter_decade(histogram: Mapping[int, int], worst: float) -> dict[int, int]:
    """The archive's counts by eighth of an octave as counts by quarter of a decade; the smallest errors are joined."""
    most = math.log10(worst) if worst > 0 else math.inf  # a bin may reach beyond its largest row, and over the bound
    counts: dict[int, int] = {}
    for index, count in histogram.items():
        middle = (LOWEST_OCTAVE + (index - 0.5) / BINS_PER_OCTAVE) * math.log10(2)
        quarter = math.floor(min(middle, most) * BINS_PER_DECADE)
        counts[quarter] = counts.get(quarter, 0) + count
    lowest = max(counts, default=0) - DECADES * BINS_PER_DECADE
    for quarter in [quarter for quarter in counts if quarter < lowest]:
        counts[lowest] = counts.get(lowest, 0) + counts.pop(quarter)
    return counts
