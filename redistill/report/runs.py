"""Runs, read from the folders that `redistill train` leaves. A run that cannot be read is one line, never a guess."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from redistill_cache import strict_json
from redistill_cache.errors import RedistillError, Refused

from redistill.metrics import Bin
from redistill.training.options import CONFIG, FREE, loss_name, read_config
from redistill.training.run_files import RESULT

__all__ = [
    "METRICS",
    "Found",
    "Group",
    "LineStyle",
    "RunRecord",
    "Unfinished",
    "group_runs",
    "pooled_bins",
    "read_runs",
    "spread",
]

METRICS = "metrics.csv"
MAX_RESULT = 16 << 20
# No figure of a run is larger; sums and squares of such are still numbers.
MAX_FIGURE = 1e100
# Figures of result.json, and of its evaluation; each may be null or left out when it was not measured.
HEADLINE = ("top1", "top5", "nll", "ece", "agreement", "images_per_second", "seconds")
EVALUATION = ("rows", "kl_t1", "kl", "temperature", "teacher_top1", "copied")
TEACHER = ("top1_where_teacher_right", "top1_where_teacher_wrong")
# Columns of metrics.csv that are text.
TEXT = ("view",)


@dataclass(frozen=True)
class RunRecord:
    """One finished student: what it was, how it went, what came of it."""

    folder: Path
    student: str
    loss: str
    seed: int
    archive_id: str | None
    epochs: int
    parameters: int
    figures: Mapping[str, float]
    """What was measured at the end: top1, nll, agreement, kl_t1, ..."""
    per_class: tuple[float | None, ...]
    bins: tuple[Bin, ...]
    options: Mapping[str, Any]
    """What `redistill train` was told, from config.toml."""
    history: tuple[Mapping[str, float], ...]
    """The figures of every epoch; empty where the run kept no metrics.csv."""


@dataclass(frozen=True)
class Unfinished:
    """A run that was stopped, or is still going."""

    folder: Path
    epochs: int | None
    """How many it has behind it; None where that cannot be read."""
    wanted: int | None

    def __str__(self) -> str:
        if self.epochs is None:
            return f"{self.folder} is not finished, and its files cannot be read"
        of = "" if self.wanted is None else f" of {self.wanted}"
        return f"{self.folder} is not finished ({self.epochs}{of} epochs)"


@dataclass(frozen=True)
class Found:
    """What lies in the folders that were named; no folder is in it twice."""

    runs: tuple[RunRecord, ...]
    unfinished: tuple[Unfinished, ...]


def read_runs(folders: Sequence[Path]) -> Found:
    """The runs in these folders, and those in the folders of cohorts."""
    members: dict[Path, Path] = {}
    for folder in folders:
        inner = [folder] if is_run(folder) else sorted(path for path in children(folder) if is_run(path))
        if not inner:
            found = "is no run" if folder.exists() else "is not there"
            raise Refused(f"{folder} {found}: expected a folder with {RESULT}, as redistill train leaves it")
        for path in inner:
            members.setdefault(path.resolve(), path)
    runs = tuple(read_run(path) for path in members.values() if (path / RESULT).is_file())
    unfinished = tuple(read_unfinished(path) for path in members.values() if not (path / RESULT).is_file())
    if not runs:
        what = "; ".join(map(str, unfinished)) or "no run was given"
        raise Refused(f"there is nothing to report: {what}; a report needs one finished run at least")
    return Found(runs, unfinished)


def is_run(folder: Path) -> bool:
    return (folder / RESULT).is_file() or (folder / CONFIG).is_file()


def children(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []


# -- one run ----------------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> RunRecord:
    try:
        result = strict_json.parse((folder / RESULT).read_bytes(), cap=MAX_RESULT, where=RESULT)
        history = read_history(folder / METRICS)
        return run_of(folder, result, read_config(folder / CONFIG), history)
    except (RedistillError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise Refused(f"{folder} does not hold a readable run: {reason}; train it again, or leave it out") from None


def run_of(
    folder: Path,
    result: Any,  # noqa: ANN401  JSON that is checked here
    options: Mapping[str, Any],
    history: tuple[Mapping[str, float], ...],
) -> RunRecord:
    result = expect(result, dict, RESULT)
    evaluation = expect(result["evaluation"] or {}, dict, "evaluation")
    beside = expect(evaluation.get("teacher") or {}, dict, "teacher")
    archive = result["archive_id"]
    return RunRecord(
        folder=folder,
        student=expect(result["student"], str, "student"),
        loss=readable_loss(expect(result["loss"], str, "loss")),
        seed=expect(result["seed"], int, "seed"),
        archive_id=None if archive is None else expect(archive, str, "archive_id"),
        epochs=expect(result["epochs"], int, "epochs"),
        parameters=expect(result["parameters"], int, "parameters"),
        figures={**numbers(result, HEADLINE), **numbers(evaluation, EVALUATION), **numbers(beside, TEACHER)},
        per_class=tuple(optional(value, "per_class") for value in expect(evaluation.get("per_class", []), list, "")),
        bins=tuple(read_bin(item) for item in expect(evaluation.get("reliability", []), list, "reliability")),
        options=options,
        history=history,
    )


def readable_loss(spec: str) -> str:
    loss_name(spec)  # or an error: groups are named after it
    return spec


def expect(value: Any, kind: type, name: str) -> Any:  # noqa: ANN401  JSON of anybody
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{name} should be of type {kind.__name__}, found {str(value)[:40]!r}")
    return value


def optional(value: Any, name: str) -> float | None:  # noqa: ANN401  JSON of anybody
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} should be a number, found {str(value)[:40]!r}")
    return checked(value, name)


def checked(number: float, name: str) -> float:
    if not abs(number) <= MAX_FIGURE:  # nan is not, either
        raise ValueError(f"{name} is {number:g}")
    return float(number)


def numbers(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Those of `names` that were measured."""
    read = {name: optional(found.get(name), name) for name in names}
    return {name: value for name, value in read.items() if value is not None}


def read_bin(item: Any) -> Bin:  # noqa: ANN401  JSON of anybody
    found = expect(item, dict, "a bin of reliability")
    low, high = optional(found["low"], "low"), optional(found["high"], "high")
    rows = expect(found["rows"], int, "rows")
    if low is None or high is None or not 0 <= low < high <= 1 or rows < 0:
        raise ValueError("a bin of reliability lies outside of 0 to 1")
    return Bin(low, high, rows, optional(found["confidence"], "confidence"), optional(found["accuracy"], "accuracy"))


def read_history(path: Path) -> tuple[Mapping[str, float], ...]:
    """The figures of every line of metrics.csv; a measure that was not taken is left out."""
    if not path.is_file():
        return ()
    try:
        lines = path.read_text(encoding="utf-8")
        if not lines.endswith("\n"):
            raise ValueError(f"{METRICS} ends in the middle of a line")
        table = csv.DictReader(io.StringIO(lines, newline=""), strict=True)
        return tuple(read_line(row, at) for at, row in enumerate(table, start=2))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{METRICS} is no table: {error}") from None


def read_line(row: Mapping[str | None, str | None], at: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, text in row.items():
        if name is None or text is None:
            raise ValueError(f"{METRICS}, line {at}, is longer or shorter than its header")
        if name in TEXT or text == "":
            continue
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{METRICS}, line {at}: {name} is no number, found {text[:40]!r}") from None
        found[name] = checked(number, f"{METRICS}, line {at}: {name}")
    if "epoch" not in found:
        raise ValueError(f"{METRICS}, line {at}, has no epoch")
    return found


def read_unfinished(folder: Path) -> Unfinished:
    """How far it got, as far as its files say; what is half of something must not stop the report of the others."""
    try:
        wanted = read_config(folder / CONFIG).get("epochs")
        return Unfinished(folder, len(read_history(folder / METRICS)), wanted if isinstance(wanted, int) else None)
    except (RedistillError, OSError, ValueError):
        return Unfinished(folder, None, None)


# -- groups -----------------------------------------------------------------------------------------------------------
#
# Runs that differ in nothing but their seeds are one line of the report; names say what tells the others apart.

SEPARATOR = " · "
# Options that do not tell groups apart: they vary with the seed, are named in another way, or decide nothing.
UNNAMED = {*FREE, "seeds", "order_seed", "losses", "students", "device", "compile", "channels_last"}


@dataclass(frozen=True)
class LineStyle:
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
    look: LineStyle
    runs: tuple[RunRecord, ...]

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


def pooled_bins(runs: Sequence[RunRecord]) -> list[Bin]:
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


def key_of(run: RunRecord) -> Key:
    options = {name: value for name, value in run.options.items() if name not in UNNAMED}
    return run.student, run.loss, run.archive_id, json.dumps(options, sort_keys=True, default=str)


def group_runs(runs: Sequence[RunRecord]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first run, and what a reader must know about runs that were not counted."""
    members: dict[Key, dict[tuple[int, str], RunRecord]] = {}
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


def group_names(groups: Sequence[tuple[RunRecord, ...]]) -> list[list[str]]:
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


def loss_names(runs: Sequence[RunRecord]) -> dict[str, str]:
    """Short names where these are unique, else the whole text."""
    texts = list(dict.fromkeys(run.loss for run in runs))
    short = [loss_name(text) for text in texts]
    return {text: name if short.count(name) == 1 else text for text, name in zip(texts, short, strict=True)}


def archive_names(runs: Sequence[RunRecord]) -> dict[str | None, str]:
    """What the archives were called when they were used, with the id where that is not enough."""
    stems: dict[str | None, str] = {}
    for run in runs:
        stems.setdefault(run.archive_id, PurePath(str(run.options.get("archive", "archive"))).name.partition(".")[0])
    called = list(stems.values())
    return {
        archive: stem if called.count(stem) == 1 else f"{stem} {(archive or 'unsealed')[:8]}"
        for archive, stem in stems.items()
    }


def differing_options(runs: Sequence[RunRecord]) -> list[str]:
    names = sorted({name for run in runs for name in run.options} - UNNAMED)
    return [name for name in names if len({repr(run.options.get(name)) for run in runs}) > 1]


def group_looks(groups: Sequence[tuple[RunRecord, ...]]) -> list[LineStyle]:
    """A colour for each loss and a kind of line for each setting; where all share a loss, a colour for each setting."""
    keys = [key_of(runs[0]) for runs in groups]
    losses = list(dict.fromkeys(loss for _, loss, _, _ in keys))
    if len(losses) == 1:
        return [LineStyle(colour=at) for at in range(len(keys))]
    settings = list(dict.fromkeys((student, *rest) for student, _, *rest in keys))
    return [LineStyle(losses.index(loss), settings.index((student, *rest))) for student, loss, *rest in keys]
