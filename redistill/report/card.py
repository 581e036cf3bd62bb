"""What an archive is, on a card: identity, contents, codecs and what they lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from redistill_cache import Archive
from redistill_cache.codecs.stats import BINS_PER_OCTAVE, LOWEST_OCTAVE, BlockStats
from redistill_cache.inspect import describe
from redistill_cache.wording import human_bytes

from redistill.report.charts import BINS_PER_DECADE, histogram
from redistill.report.markup import NOTHING, definition_list, figure, missing, section, table, text
from redistill.report.runs import Group

__all__ = ["archive_card"]

# Errors further below the largest than so many decades are drawn together.
DECADES = 6


def archive_card(archive: Archive | None, groups: Sequence[Group]) -> str:
    title = "The archive"
    if archive is None:
        return section(title, missing("Its card needs --archive."))
    found = describe(archive)
    items = [*identity(found), *models(found), *provenance(found, archive, groups)]
    charts = "".join(
        fidelity_chart(archive, teacher, signal) for teacher, signals in found["teachers"].items() for signal in signals
    )
    body = f'<div class="card">{definition_list(items)}</div>{codecs(found)}<div class="grid">{charts}</div>'
    return section(title, body)


def identity(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    total = f"{human_bytes(found['total_bytes'])} in all, {found['bytes_per_view']:.1f} bytes a view"
    excluded = f", {len(found['excluded']):,} left out" if found["excluded"] else ""
    return [
        ("id", f"<code>{text(found['id'])}</code>"),
        ("images", f"{found['num_samples']:,}{excluded}, {found['num_classes']:,} classes"),
        ("views", f"{found['num_views']:,} of each image, seed {text(found['seed'])}"),
        ("recipe", text(recipe_text(found["recipe"]))),
        ("size", text(total)),
    ]


def models(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    items = []
    for name, model in found["models"].items():
        digest = model.get("weights_digest")
        weights = f", weights <code>{text(digest)[:12]}</code>" if digest else ""
        items.append((f"teacher {name}", f"{text(model.get('spec', 'not stated'))}{weights}"))
    return items


def provenance(found: Mapping[str, Any], archive: Archive, groups: Sequence[Group]) -> list[tuple[str, str]]:
    taught = [group.name for group in groups if group.runs[0].archive_id == archive.id]
    who = "all groups of this page" if len(taught) == len(groups) else ", ".join(taught) or "no group of this page"
    return [
        ("data", text(plain(found["source"]) or "not stated")),
        ("licence", text(found["licence"] or "not stated")),
        ("citation", text(found["citation"] or "not stated")),
        ("taught", text(who)),
    ]


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The operations with their settings, whatever a stranger has written there."""
    ops = recipe.get("ops", [])
    said = []
    for op in ops if isinstance(ops, list) else [ops]:
        if not isinstance(op, dict):
            said.append(str(op))
            continue
        settings = plain({name: value for name, value in op.items() if name != "op"})
        said.append(f"{op.get('op', '?')} ({settings})" if settings else str(op.get("op", "?")))
    return f"{', then '.join(said) or 'none'}; {recipe.get('size', '?')} pixels"


def plain(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)


# -- what the codecs lost ---------------------------------------------------------------------------------------------


def codecs(found: Mapping[str, Any]) -> str:
    lost_at = [column for t in (1, 4) for column in (f"KL, T = {t}", "99th of 100", "largest")]
    columns = ("signal", "codec", "bytes a view", "float16", *lost_at, "same top-1 %")
    rows = []
    for teacher, signals in found["teachers"].items():
        for name, signal in signals.items():
            lost = signal["fidelity"] or {}
            keys = [f"{kind}_kl_t{t}" for t in (1, 4) for kind in ("mean", "p99", "max")]
            kept = lost.get("top1_agreement")
            rows.append(
                [
                    text(f"{teacher}, {name}"),
                    text(signal["codec"]),
                    f"{signal['bytes_per_view']:.1f}",
                    f"{2 * signal['width']:,}",
                    *(small(lost.get(key)) for key in keys),
                    NOTHING if kept is None else f"{100 * kept:.2f}",
                ]
            )
    return table(columns, rows, "figures")


def small(number: float | None) -> str:
    if number is None:
        return NOTHING
    return "0" if number == 0 else f"{number:.1e}".replace("e-0", "e−").replace("e-", "e−")


def fidelity_chart(archive: Archive, teacher: str, signal: str) -> str:
    """How many rows lost how much, from the statistics that were kept while encoding."""
    stats = archive.state.stats.get(teacher, {}).get(signal)
    if stats is None:
        return ""
    errors = BlockStats.from_json(stats).errors
    bound = archive.signal(teacher, signal)[1].config.get("fidelity")
    mark = float(bound) if isinstance(bound, int | float) and bound > 0 else None
    charts = []
    for temperature in (1, 4):
        kept = errors.get(f"kl_t{temperature}")
        counts = {} if kept is None else by_quarter_decade(kept.histogram, kept.worst)
        title = f"{teacher}, {signal}: rows by KL at T = {temperature}"
        charts.append(figure(title, histogram(title, counts, mark=mark), "lost by encoding, of every view"))
    return "".join(charts)


def by_quarter_decade(histogram: Mapping[int, int], worst: float) -> dict[int, int]:
    """Counts of the archive's bins (eighths of an octave) in wider ones; what is very small is drawn together."""
    most = math.log10(worst) if worst > 0 else math.inf  # a bin reaches beyond its largest row, perhaps over the bound
    counts: dict[int, int] = {}
    for bin_, count in histogram.items():
        middle = (LOWEST_OCTAVE + (bin_ - 0.5) / BINS_PER_OCTAVE) * math.log10(2)
        quarter = math.floor(min(middle, most) * BINS_PER_DECADE)
        counts[quarter] = counts.get(quarter, 0) + count
    lowest = max(counts, default=0) - DECADES * BINS_PER_DECADE
    for quarter in [quarter for quarter in counts if quarter < lowest]:
        counts[lowest] = counts.get(lowest, 0) + counts.pop(quarter)
    return counts
