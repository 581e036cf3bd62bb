"""Runs that differ in nothing but their seeds are one line of the report; names say what tells the others apart."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from redistill.calibration import Bin
from redistill.report.runs import Run
from redistill.training.options import FREE, loss_name

__all__ = ["Group", "Look", "group_runs", "pooled_bins", "spread"]

SEPARATOR = " · "
# Options that do not tell groups apart: they vary with the seed, are named in another way, or decide nothing.
UNNAMED = {*FREE, "seeds", "order_seed", "losses", "students", "device", "compile", "channels_last"}


@dataclass(frozen=True)
class Look:
    """How a group is drawn: a colour for what is minimised, and solid or broken lines for everything else."""

    colour: int = 0
    dash: int = 0

    def __str__(self) -> str:
        return f"c{self.colour % 8} d{self.dash % 4}"


@dataclass(frozen=True)
class Group:
    """The seeds of one student, loss, archive and set of options."""

    name: str
    short: str
    """As much of the name as no other group has, for where room is scarce."""
    look: Look
    runs: tuple[Run, ...]

    def values(self, figure: str) -> list[float]:
        """A figure of every run that has it."""
        return [run.figures[figure] for run in self.runs if figure in run.figures]

    def curve(self, column: str) -> list[tuple[float, list[float]]]:
        """(epoch, values over seeds) of a column of metrics.csv."""
        points: dict[float, list[float]] = {}
        for run in self.runs:
            for row in run.history:
                if column in row:
                    points.setdefault(row["epoch"], []).append(row[column])
        return sorted(points.items())

    def columns(self, prefix: str) -> list[str]:
        return sorted({name for run in self.runs for row in run.history for name in row if name.startswith(prefix)})

    def per_class(self) -> dict[int, float]:
        """Mean accuracy of every class over seeds; a class without images is left out."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            for k, value in enumerate(run.per_class):
                if value is not None:
                    found.setdefault(k, []).append(value)
        return {k: statistics.fmean(values) for k, values in found.items()}


def spread(values: Sequence[float]) -> tuple[float, float | None] | None:
    """Mean and standard deviation; one value has no deviation, and nothing has no mean."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def pooled_bins(runs: Sequence[Run]) -> list[Bin]:
    """The reliability of all seeds together; empty where none was validated, or their bins differ."""
    tables = [run.bins for run in runs if run.bins]
    edges = {tuple((item.low, item.high) for item in table) for table in tables}
    if len(edges) != 1:
        return []
    return [pooled(same) for same in zip(*tables, strict=True)]


def pooled(bins: Sequence[Bin]) -> Bin:
    rows = sum(item.rows for item in bins)

    def mean(pairs: list[tuple[int, float | None]]) -> float | None:
        return sum(n * value for n, value in pairs if value is not None) / rows if rows else None

    confidence = mean([(item.rows, item.confidence) for item in bins])
    accuracy = mean([(item.rows, item.accuracy) for item in bins])
    return Bin(bins[0].low, bins[0].high, rows, confidence, accuracy)


# -- grouping ---------------------------------------------------------------------------------------------------------

Key = tuple[str, str, str | None, str]


def key_of(run: Run) -> Key:
    options = {name: value for name, value in run.options.items() if name not in UNNAMED}
    return run.student, run.loss, run.archive_id, json.dumps(options, sort_keys=True, default=str)


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first run, and what a reader must know about runs that were not counted."""
    members: dict[Key, dict[tuple[int, str], Run]] = {}
    notes = []
    for run in runs:
        seeds = (run.seed, str(run.options.get("order_seed")))
        first = members.setdefault(key_of(run), {}).setdefault(seeds, run)
        if first is not run:
            notes.append(f"{run.folder} is the same run as {first.folder}, seed and all; only the first is counted")
    groups = [tuple(found.values()) for found in members.values()]
    names, looks = group_names(groups), group_looks(groups)
    full = [SEPARATOR.join(parts) for parts in names]
    return [Group(*parts) for parts in zip(full, shortened(names), looks, groups, strict=True)], notes


def shortened(names: Sequence[Sequence[str]]) -> list[str]:
    """The names cut after the first part by which all are different."""
    heads: list[str] = []
    for count in range(1, max(map(len, names), default=0) + 1):
        heads = [SEPARATOR.join(parts[:count]) for parts in names]
        if len(set(heads)) == len(heads):
            break
    return heads


def group_names(groups: Sequence[tuple[Run, ...]]) -> list[list[str]]:
    """The parts of each name: the loss, and of everything else what is not the same in all groups."""
    firsts = [runs[0] for runs in groups]
    losses, archives = loss_names(firsts), archive_names(firsts)
    several_students = len({run.student for run in firsts}) > 1
    differing = differing_options(firsts)
    names = []
    for run in firsts:
        parts = [run.student] if several_students else []
        parts.append(losses[run.loss])
        if len(archives) > 1:
            parts.append(archives[run.archive_id])
        parts += [f"{name} {run.options.get(name, 'default')}" for name in differing]
        names.append(parts)
    return names


def loss_names(runs: Sequence[Run]) -> dict[str, str]:
    """Short names where these are unique, else the whole text."""
    texts = list(dict.fromkeys(run.loss for run in runs))
    short = [loss_name(text) for text in texts]
    return {text: name if short.count(name) == 1 else text for text, name in zip(texts, short, strict=True)}


def archive_names(runs: Sequence[Run]) -> dict[str | None, str]:
    """What the archives were called when they were used, with the id where that is not enough."""
    stems: dict[str | None, str] = {}
    for run in runs:
        stems.setdefault(run.archive_id, PurePath(str(run.options.get("archive", "archive"))).name.partition(".")[0])
    called = list(stems.values())
    return {
        archive: stem if called.count(stem) == 1 else f"{stem} {(archive or 'unsealed')[:8]}"
        for archive, stem in stems.items()
    }


def differing_options(runs: Sequence[Run]) -> list[str]:
    names = sorted({name for run in runs for name in run.options} - UNNAMED)
    return [name for name in names if len({repr(run.options.get(name)) for run in runs}) > 1]


def group_looks(groups: Sequence[tuple[Run, ...]]) -> list[Look]:
    """A colour for each loss and a kind of line for each setting; where all share a loss, a colour for each setting."""
    keys = [key_of(runs[0]) for runs in groups]
    losses = list(dict.fromkeys(loss for _, loss, _, _ in keys))
    if len(losses) == 1:
        return [Look(colour=at) for at in range(len(keys))]
    settings = list(dict.fromkeys((student, *rest) for student, _, *rest in keys))
    return [Look(losses.index(loss), settings.index((student, *rest))) for student, loss, *rest in keys]
