"""The page: its data is computed here, in the order of the sections, and rendered by templates/report.html.

All text is escaped by the environment of the templates; only charts, which escape names themselves, are `Markup`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from redistill_cache import Archive, open_archive
from redistill_cache.errors import UsageError
from redistill_cache.storage import LOCAL, disk_trouble
from redistill_cache.wording import harmless

from redistill.report.card import archive_card
from redistill.report.charts import (
    MAX_LABELLED,
    Curve,
    Figure,
    class_chart,
    line_chart,
    reliability_diagram,
    seed_dots,
)
from redistill.report.examples import VIEW, Examples, find_examples
from redistill.report.runs import Group, LineStyle, RunList, RunRecord, group_runs, pooled_bins, read_runs

__all__ = ["WrittenReport", "write_report"]

# Of a long list of classes the page shows this many from either end.
CLASSES = 14
RUN_COLUMNS = ("group", "seed", "epochs", "archive", "loss", "folder")


@dataclass(frozen=True)
class WrittenReport:
    """What a written page covers."""

    runs: int
    groups: int
    notes: tuple[str, ...]
    """What it does not cover or compare, and why: unfinished and unreadable runs, duplicate runs, another archive."""


def write_report(
    runs: Sequence[Path], out: Path, *, archive: Path | None = None, data: str | None = None
) -> WrittenReport:
    """Write a page about `runs` to `out`. `archive` adds its description, `data` (its images) adds example views."""
    if data is not None and archive is None:
        raise UsageError("--data shows example views of an archive; pass --archive as well")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; pass the file to write, such as {out / 'report.html'}")
    run_list = read_runs(runs)
    groups, duplicates = group_runs(run_list.finished)
    opened = None if archive is None else open_archive(archive)
    examples = find_examples(opened, data, groups) if opened is not None and data is not None else None
    notes = [*map(str, (*run_list.unfinished, *run_list.unreadable)), *duplicates, *comparison_notes(groups, opened)]
    page = render(run_list, groups, opened, examples, notes)
    with disk_trouble("write", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        LOCAL.publish(out, page.encode())
    return WrittenReport(sum(len(group.runs) for group in groups), len(groups), tuple(notes))


def comparison_notes(groups: Sequence[Group], archive: Archive | None) -> list[str]:
    """What makes the numbers of this page hard to compare."""
    runs = [run for group in groups for run in group.runs]
    notes = []
    if archive is not None and all(run.archive_id != archive.id for run in runs):
        notes.append(f"no run used the archive {archive.path}: its id differs from the archive id of every run")
    validated = {run.val or "none" for run in runs}
    if len(validated) > 1:
        notes.append(f"the runs were validated on different data: {', '.join(sorted(validated))}")
    not_compared = [str(run.folder) for run in runs if run.alignment == "no canaries"]
    if not_compared:
        notes.append(f"the archive has no canaries, so its views were not compared: {', '.join(not_compared)}")
    without_curves = [str(run.folder) for run in runs if not run.history]
    if without_curves:
        notes.append(f"no metrics.csv, so no curves: {', '.join(without_curves)}")
    return notes


def render(
    run_list: RunList,
    groups: Sequence[Group],
    archive: Archive | None,
    examples: Examples | None,
    notes: Sequence[str],
) -> str:
    top1 = [value for group in groups for value in group.values("top1")]
    low, high = min(top1, default=0.0), max(top1, default=1.0)
    context: dict[str, Any] = {
        "title": "Distillation report" if archive is None else f"Students of {', '.join(archive.teachers)}",
        "summary": summary(groups),
        "notes": notes,
        "groups": groups,
        "validated": bool(top1),
        "seed_dots": lambda group, metric: seed_dots(group.values(metric), low, high, group.style),
        "labelled": len(groups) <= MAX_LABELLED,
        "curves": training_curves(groups),
        "agreement": agreement(groups),
        "calibration": reliability_diagrams(groups),
        "classes": class_accuracy(groups, class_names(groups, archive)),
        "loss_terms": loss_terms(groups),
        "view": VIEW,
        "examples": examples,
        "archive": None if archive is None else archive_card(archive, groups),
        "run_columns": RUN_COLUMNS,
        "run_rows": run_rows(run_list, groups),
        "version": metadata.version("redistill"),
    }
    return environment().get_template("report.html").render(context)


def environment() -> Environment:
    """Templates that escape every expression: HTML by autoescape, control characters by `harmless`."""
    templates = Environment(
        loader=PackageLoader("redistill.report"),
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else harmless(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["mean_sd"] = mean_sd
    return templates


def summary(groups: Sequence[Group]) -> str:
    """One sentence: the number of runs, their students, epochs and test images."""
    runs = [run for group in groups for run in group.runs]
    students = {f"{run.student} ({run.parameters:,} parameters)": None for run in runs}
    epochs = sorted({run.epochs for run in runs})
    trained = f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]} to {epochs[-1]}"
    unit = "epoch" if epochs == [1] else "epochs"
    images = sorted({int(run.metrics["rows"]) for run in runs if "rows" in run.metrics})
    tested = f", tested on {images[0]:,} held-out images" if len(images) == 1 else ""
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs in {len(groups)} groups"
    return f"{count}: {', '.join(students)}, trained for {trained} {unit}{tested}."


class MeanSd(NamedTuple):
    mean: str
    sd: str


def mean_sd(values: Sequence[float], digits: int) -> MeanSd | None:
    """Mean and standard deviation as text; a single value has no deviation, an empty list no mean."""
    if not values:
        return None
    deviation = f"± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return MeanSd(f"{statistics.fmean(values):,.{digits}f}", deviation)


# -- sections ---------------------------------------------------------------------------------------------------------


def curve_figure(title: str, groups: Sequence[Group], column: str, caption: str, *, percent: bool = False) -> Figure:
    curves = [Curve(group.short, group.curve(column), group.style) for group in groups]
    return Figure(title, line_chart(title, curves, percent=percent), caption)


def drawn(figures: Sequence[Figure]) -> list[Figure]:
    return [figure for figure in figures if figure.drawing]


def training_curves(groups: Sequence[Group]) -> list[Figure]:
    return drawn(
        [
            curve_figure("Top-1", groups, "val_top1", "on held-out images", percent=True),
            curve_figure("Negative log-likelihood", groups, "val_nll", "on held-out images"),
            curve_figure("Training loss", groups, "train_loss", "each loss has its own scale"),
        ]
    )


@dataclass(frozen=True)
class Agreement:
    """Students beside their teacher on held-out views."""

    teacher_top1: str
    """In percent; "" if not recorded."""
    temperature: str
    """Of the second KL divergence."""
    figures: list[Figure]


def agreement(groups: Sequence[Group]) -> Agreement | None:
    if not any(group.values("agreement") for group in groups):
        return None
    teacher_top1 = [value for group in groups for value in group.values("teacher_top1")]
    temperatures = sorted({value for group in groups for value in group.values("temperature")})
    return Agreement(
        teacher_top1=f"{100 * statistics.fmean(teacher_top1):.1f}" if teacher_top1 else "",
        temperature=f"{temperatures[0]:g}" if len(temperatures) == 1 else "high",
        figures=drawn(
            [
                curve_figure("Agreement", groups, "val_agreement", "same top-1 class as the teacher", percent=True),
                curve_figure("KL(teacher ‖ student)", groups, "val_kl_t1", "at T=1"),
            ]
        ),
    )


def reliability_diagrams(groups: Sequence[Group]) -> list[Figure]:
    """One for each validated group, all seeds pooled."""
    figures = []
    for group in groups:
        bins = pooled_bins(group.runs)
        if bins:
            ece = statistics.fmean(group.values("ece") or [0.0])
            diagram = reliability_diagram(group.name, bins, group.style)
            figures.append(Figure(group.name, diagram, f"ECE {ece:.3f}"))
    return figures


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy by class, sorted by the gain of the best group over the first."""

    groups: list[Group]
    base: str
    best: str
    """The same as `base` if there is only one group."""
    named: bool
    shown: int
    total: int
    figures: list[Figure]


def class_accuracy(groups: Sequence[Group], names: Sequence[str] | None) -> ClassAccuracy | None:
    validated = [group for group in groups if group.per_class()]
    if not validated:
        return None
    base, best = 0, best_other(validated)
    low, high = validated[base].per_class(), validated[best].per_class()
    gain = {k: high[k] - (low[k] if best != base else 0.0) for k in high if k in low}
    order = sorted(gain, key=lambda k: (-gain[k], k))
    half = min((len(order) + 1) // 2, CLASSES)
    columns = [order] if len(order) <= CLASSES else [order[:half], order[max(half, len(order) - CLASSES) :]]
    figures = []
    for classes in columns:
        labels = [str(k) if names is None else names[k] for k in classes]
        figures.append(Figure("", class_chart(labels, validated, classes, (base, best))))
    return ClassAccuracy(
        groups=validated,
        base=validated[base].short,
        best=validated[best].short,
        named=names is not None,
        shown=sum(map(len, columns)),
        total=len(order),
        figures=figures,
    )


def best_other(groups: Sequence[Group]) -> int:
    """The group of the highest mean top-1 besides the first, or the first if it is the only one."""
    means = [statistics.fmean(group.values("top1") or [0.0]) for group in groups]
    return max(range(1, len(groups)), key=lambda k: means[k], default=0)


def class_names(groups: Sequence[Group], archive: Archive | None) -> Sequence[str] | None:
    """The archive's class names, if a run used the archive and all runs have as many classes."""
    if archive is None or archive.class_names is None:
        return None
    runs = [run for group in groups for run in group.runs]
    used = any(run.archive_id == archive.id for run in runs)
    same_classes = all(len(run.per_class) in (0, archive.num_classes) for run in runs)
    return archive.class_names if used and same_classes else None


def loss_terms(groups: Sequence[Group]) -> list[Figure]:
    """The terms of each loss during training."""
    figures = []
    for group in groups:
        columns = [name for name in group.columns("train_") if name != "train_loss"]
        curves = [
            Curve(name.removeprefix("train_"), group.curve(name), LineStyle(group.style.colour, k))
            for k, name in enumerate(columns)
        ]
        figures.append(Figure(group.name, line_chart(group.name, curves)))
    return drawn(figures)


def run_rows(run_list: RunList, groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """Cells of RUN_COLUMNS for every run."""

    def row(group: Group, run: RunRecord) -> tuple[str, ...]:
        return group.name, str(run.seed), str(run.epochs), (run.archive_id or "")[:12], run.loss, str(run.folder)

    rows = [row(group, run) for group in groups for run in group.runs]
    for run in run_list.unfinished:
        rows.append(("not finished", "", "" if run.epochs is None else str(run.epochs), "", "", str(run.folder)))
    for unreadable in run_list.unreadable:
        rows.append(("not readable", "", "", "", "", str(unreadable.folder)))
    return rows
