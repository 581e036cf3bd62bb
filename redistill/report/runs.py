"""Finished runs, read from the folders that `redistill train` writes, and grouped by everything but the seed.

The files are untrusted: a run that cannot be read is listed with the reason, and the others are shown.
"""

from __future__ import annotations

import csv
import io
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from redistill_cache import strict_json
from redistill_cache.errors import RedistillError, Refused
from redistill_cache.limits import MAX_CLASSES, MAX_TEXT
from redistill_cache.storage import read_small
from redistill_cache.strict_json import Fields, Json

from redistill.metrics import Bin
from redistill.specs import listed
from redistill.training.options import CONFIG, FREE_ON_RESUME, loss_name, read_config
from redistill.training.run_files import RESULT

__all__ = [
    "Group",
    "LineStyle",
    "RunList",
    "RunRecord",
    "Unfinished",
    "Unreadable",
    "group_runs",
    "pooled_bins",
    "read_runs",
]

METRICS = "metrics.csv"
MAX_RESULT = 16 << 20
MAX_HISTORY = 4 << 20  # ten thousand epochs
MAX_COUNT = 2**63 - 1
MAX_BINS = 10_000
# Far above any metric, and sums and squares of such numbers are still finite.
MAX_METRIC = 1e100
# Metrics of result.json, of its "evaluation" and of the "teacher" in that; null or missing when not measured.
HEADLINE = ("top1", "top5", "nll", "ece", "agreement", "images_per_second", "seconds")
EVALUATION = ("rows", "kl_t1", "kl", "temperature", "teacher_top1", "copied")
TEACHER = ("top1_where_teacher_right", "top1_where_teacher_wrong")
# Columns of metrics.csv that hold text.
TEXT_COLUMNS = ("view",)
# Options that do not separate groups: they vary with the seed, are named in another way, or do not change the result.
NOT_GROUPED = {*FREE_ON_RESUME, "seeds", "order_seed", "losses", "students", "compile", "channels_last"}
SEPARATOR = " · "


@dataclass(frozen=True)
class RunRecord:
    """One finished run: its options, its metrics of every epoch and its final evaluation."""

    folder: Path
    student: str
    loss: str
    seed: int
    order_seed: int | None
    archive_id: str | None
    alignment: str | None
    """The verdict on the views; None in the results of earlier versions."""
    archive_name: str
    """The file name of the archive at training time, without suffixes."""
    val: str | None
    epochs: int
    parameters: int
    metrics: Mapping[str, float]
    """Final metrics: top1, nll, agreement, kl_t1, ..."""
    per_class: tuple[float | None, ...]
    bins: tuple[Bin, ...]
    options: Mapping[str, str]
    """The options of config.toml that separate groups, as text."""
    history: tuple[Mapping[str, float], ...]
    """The rows of metrics.csv; empty if the run has no such file."""


@dataclass(frozen=True)
class Unfinished:
    """A run that was stopped or is still training."""

    folder: Path
    epochs: int | None
    """Completed epochs; None if the files cannot be read."""
    planned: int | None

    def __str__(self) -> str:
        if self.epochs is None:
            return f"{self.folder} is not finished, and its files cannot be read"
        total = "" if self.planned is None else f" of {self.planned}"
        return f"{self.folder} is not finished ({self.epochs}{total} epochs)"


@dataclass(frozen=True)
class Unreadable:
    """A finished run whose files are damaged or hostile. The others are shown without it."""

    folder: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.folder} is not a readable run: {self.reason}; train it again or leave it out"


@dataclass(frozen=True)
class RunList:
    """The runs in the folders a user named, each folder once."""

    finished: tuple[RunRecord, ...]
    unfinished: tuple[Unfinished, ...]
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True)
class LineStyle:
    """How a group is drawn: a colour and a dash pattern, as classes of the style sheet."""

    colour: int = 0
    dash: int = 0

    @property
    def colour_class(self) -> str:
        return f"c{self.colour % 8}"

    def __str__(self) -> str:
        return f"{self.colour_class} d{self.dash % 4}"


@dataclass(frozen=True)
class Group:
    """The runs that share student, loss, archive and options, and differ in their seeds."""

    name: str
    short: str
    """The leading parts of the name that make it unique, for places with little room."""
    style: LineStyle
    runs: tuple[RunRecord, ...]

    def values(self, metric: str) -> list[float]:
        """A final metric of every run that has it."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def percentages(self, metric: str) -> list[float]:
        return [100 * value for value in self.values(metric)]

    def curve(self, column: str) -> list[tuple[float, list[float]]]:
        """(epoch, values of the seeds) of a column of metrics.csv."""
        points: dict[float, list[float]] = {}
        for run in self.runs:
            for row in run.history:
                if column in row:
                    points.setdefault(row["epoch"], []).append(row[column])
        return sorted(points.items())

    def columns(self, prefix: str) -> list[str]:
        return sorted({name for run in self.runs for row in run.history for name in row if name.startswith(prefix)})

    def per_class(self) -> dict[int, float]:
        """Mean accuracy over seeds of every class that has images."""
        values: dict[int, list[float]] = {}
        for run in self.runs:
            for k, accuracy in enumerate(run.per_class):
                if accuracy is not None:
                    values.setdefault(k, []).append(accuracy)
        return {k: statistics.fmean(accuracies) for k, accuracies in values.items()}


# -- reading ----------------------------------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> RunList:
    """The runs in these folders; a folder that is not a run is searched for runs one level down."""
    members: dict[Path, Path] = {}
    for folder in folders:
        inner = [folder] if is_run(folder) else sorted(path for path in subfolders(folder) if is_run(path))
        if not inner:
            problem = "is not a run" if folder.exists() else "does not exist"
            raise Refused(f"{folder} {problem}: expected a folder with {RESULT}, as redistill train writes it")
        for path in inner:
            members.setdefault(path.resolve(), path)
    read = [read_run(path) if (path / RESULT).is_file() else read_unfinished(path) for path in members.values()]
    runs = RunList(
        tuple(run for run in read if isinstance(run, RunRecord)),
        tuple(run for run in read if isinstance(run, Unfinished)),
        tuple(run for run in read if isinstance(run, Unreadable)),
    )
    if not runs.finished:
        reason = listed(map(str, (*runs.unfinished, *runs.unreadable)), "; ") or "no folder was passed"
        raise Refused(f"a report needs at least one finished run: {reason}")
    return runs


def is_run(folder: Path) -> bool:
    return (folder / RESULT).is_file() or (folder / CONFIG).is_file()


def subfolders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []


def read_run(folder: Path) -> RunRecord | Unreadable:
    try:
        result = strict_json.parse(read_file(folder / RESULT, MAX_RESULT), cap=MAX_RESULT, where=RESULT)
        return make_record(folder, Fields(result, RESULT), read_config(folder / CONFIG), read_history(folder / METRICS))
    except (RedistillError, OSError, ValueError) as error:
        return Unreadable(folder, str(error))


def read_file(path: Path, cap: int) -> bytes:
    """A link to a file of another folder is the user's own doing."""
    return read_small(Path(os.path.realpath(path)), cap)


def make_record(
    folder: Path, result: Fields, config: Mapping[str, Json], history: tuple[Mapping[str, float], ...]
) -> RunRecord:
    options = Fields(config, CONFIG)
    evaluation = nested(result, "evaluation")
    teacher = nested(evaluation, "teacher")
    loss = result.text("loss", MAX_TEXT)
    loss_name(loss)  # refuses a loss that has no name; groups are named after it
    archive = options.text("archive", MAX_TEXT) if "archive" in options else "archive"
    return RunRecord(
        folder=folder,
        student=result.text("student", MAX_TEXT),
        loss=loss,
        seed=result.integer("seed", 0, MAX_COUNT),
        order_seed=options.integer("order_seed", 0, MAX_COUNT) if "order_seed" in options else None,
        archive_id=None if result.is_null("archive_id") else result.text("archive_id", MAX_TEXT),
        archive_name=PurePath(archive).name.partition(".")[0],
        val=options.text("val", MAX_TEXT) if "val" in options else None,
        alignment=result.text("alignment", MAX_TEXT) if "alignment" in result else None,
        epochs=result.integer("epochs", 0, MAX_COUNT),
        parameters=result.integer("parameters", 0, MAX_COUNT),
        metrics=metrics(result, HEADLINE) | metrics(evaluation, EVALUATION) | metrics(teacher, TEACHER),
        per_class=read_per_class(evaluation),
        bins=read_bins(evaluation),
        options={name: str(value) for name, value in config.items() if name not in NOT_GROUPED},
        history=history,
    )


def nested(fields: Fields, key: str) -> Fields:
    """The object in a field, without fields where it is null or missing."""
    return Fields(fields.mapping(key) if present(fields, key) else {}, f"{RESULT}: {key}")


def present(fields: Fields, key: str) -> bool:
    return key in fields and not fields.is_null(key)


def metrics(fields: Fields, names: Sequence[str]) -> dict[str, float]:
    """Those of `names` that were measured."""
    return {name: fields.number(name, -MAX_METRIC, MAX_METRIC) for name in names if present(fields, name)}


def read_per_class(evaluation: Fields) -> tuple[float | None, ...]:
    if not present(evaluation, "per_class"):
        return ()
    classes = {str(k): accuracy for k, accuracy in enumerate(evaluation.items("per_class", MAX_CLASSES))}
    measured = metrics(Fields(classes, f"{RESULT}: per_class"), list(classes))
    return tuple(measured.get(k) for k in classes)


def read_bins(evaluation: Fields) -> tuple[Bin, ...]:
    """The reliability table."""
    bins = []
    for k, item in enumerate(evaluation.items("reliability", MAX_BINS) if present(evaluation, "reliability") else []):
        fields = Fields(item, f"{RESULT}: reliability {k}")
        low, high = fields.number("low", 0, 1), fields.number("high", 0, 1)
        if low >= high:
            fields.refuse("high", f"above {low:g}")
        means = metrics(fields, ("confidence", "accuracy"))
        rows = fields.integer("rows", 0, MAX_COUNT)
        bins.append(Bin(low, high, rows, means.get("confidence"), means.get("accuracy")))
    return tuple(bins)


def read_history(path: Path) -> tuple[Mapping[str, float], ...]:
    """The rows of metrics.csv, without the values that were not measured."""
    if not path.exists():
        return ()
    try:
        text = read_file(path, MAX_HISTORY).decode()
        if not text.endswith("\n"):
            raise Refused(f"{METRICS} ends in the middle of a line")
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return tuple(read_row(row, f"{METRICS}, line {line}") for line, row in enumerate(table, start=2))
    except (csv.Error, UnicodeDecodeError) as error:
        raise Refused(f"{METRICS} is not a CSV table: {error}") from None


def read_row(row: Mapping[str | None, str | None], where: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, text in row.items():
        if name is None or text is None:
            raise Refused(f"{where}: expected one value for each column of the header")
        if name not in TEXT_COLUMNS and text != "":
            values[name] = read_number(text, f"{where}: {name}")
    if "epoch" not in values:
        raise Refused(f"{where}: the epoch is missing")
    return values


def read_number(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise Refused(f"{where}: expected a number, found {text[:40]!r}") from None
    if not abs(number) <= MAX_METRIC:  # also refuses NaN
        raise Refused(f"{where}: expected a number of at most {MAX_METRIC:g}, found {number:g}")
    return number


def read_unfinished(folder: Path) -> Unfinished:
    """Its progress where the files can be read; damaged files must not prevent the report of the finished runs."""
    try:
        config = Fields(read_config(folder / CONFIG), CONFIG)
        planned = config.integer("epochs", 0, MAX_COUNT) if "epochs" in config else None
        return Unfinished(folder, len(read_history(folder / METRICS)), planned)
    except (RedistillError, OSError, ValueError):
        return Unfinished(folder, None, None)


# -- grouping ---------------------------------------------------------------------------------------------------------


def group_runs(runs: Sequence[RunRecord]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first run, and a note for every duplicate run, which is not counted."""
    members: dict[tuple[object, ...], dict[tuple[int, int | None], RunRecord]] = {}
    notes = []
    for run in runs:
        key = (run.loss, *settings(run))
        first = members.setdefault(key, {}).setdefault((run.seed, run.order_seed), run)
        if first is not run:
            notes.append(f"{run.folder} is the same run as {first.folder}, with the same seeds; only the first counts")
    groups = [tuple(seeds.values()) for seeds in members.values()]
    firsts = [runs[0] for runs in groups]
    names = group_names(firsts)
    full = [SEPARATOR.join(parts) for parts in names]
    return [Group(*parts) for parts in zip(full, shortened(names), line_styles(firsts), groups, strict=True)], notes


def settings(run: RunRecord) -> tuple[object, ...]:
    """Everything that separates groups, besides the loss."""
    return run.student, run.archive_id, tuple(sorted(run.options.items()))


def group_names(firsts: Sequence[RunRecord]) -> list[list[str]]:
    """The parts of each name: the loss, and whatever else is not the same in all groups."""
    losses, archives = loss_names(firsts), archive_names(firsts)
    several_students = len({run.student for run in firsts}) > 1
    options = sorted({name for run in firsts for name in run.options})
    differing = [name for name in options if len({run.options.get(name) for run in firsts}) > 1]
    names = []
    for run in firsts:
        parts = [run.student] if several_students else []
        parts.append(losses[run.loss])
        if len(archives) > 1:
            parts.append(archives[run.archive_id])
        parts += [f"{name} {run.options.get(name, 'default')}" for name in differing]
        names.append(parts)
    return names


def shortened(names: Sequence[Sequence[str]]) -> list[str]:
    """Every name cut to the least number of parts that keeps all of them different."""
    heads: list[str] = []
    for count in range(1, max(map(len, names), default=0) + 1):
        heads = [SEPARATOR.join(parts[:count]) for parts in names]
        if len(set(heads)) == len(heads):
            break
    return heads


def loss_names(runs: Sequence[RunRecord]) -> dict[str, str]:
    """The name of each loss where it is unique, else its whole spec."""
    specs = list(dict.fromkeys(run.loss for run in runs))
    short = [loss_name(spec) for spec in specs]
    return {spec: name if short.count(name) == 1 else spec for spec, name in zip(specs, short, strict=True)}


def archive_names(runs: Sequence[RunRecord]) -> dict[str | None, str]:
    """The file name of each archive, followed by the start of its id where it is not unique."""
    stems: dict[str | None, str] = {}
    for run in runs:
        stems.setdefault(run.archive_id, run.archive_name)
    names = list(stems.values())
    return {
        archive_id: stem if names.count(stem) == 1 else f"{stem} {(archive_id or 'unsealed')[:8]}"
        for archive_id, stem in stems.items()
    }


def line_styles(firsts: Sequence[RunRecord]) -> list[LineStyle]:
    """A colour for each loss and a dash pattern for each setting; a colour for each group if all have the same loss."""
    losses = list(dict.fromkeys(run.loss for run in firsts))
    if len(losses) == 1:
        return [LineStyle(colour=k) for k in range(len(firsts))]
    dashes = list(dict.fromkeys(map(settings, firsts)))
    return [LineStyle(losses.index(run.loss), dashes.index(settings(run))) for run in firsts]


def pooled_bins(runs: Sequence[RunRecord]) -> list[Bin]:
    """The reliability table over all seeds; empty if no run has one or their bins differ."""
    tables = [run.bins for run in runs if run.bins]
    edges = {tuple((item.low, item.high) for item in table) for table in tables}
    return [pool(bins) for bins in zip(*tables, strict=True)] if len(edges) == 1 else []


def pool(bins: Sequence[Bin]) -> Bin:
    rows = sum(item.rows for item in bins)

    def mean(pairs: list[tuple[int, float | None]]) -> float | None:
        return sum(n * value for n, value in pairs if value is not None) / rows if rows else None

    confidence = mean([(item.rows, item.confidence) for item in bins])
    accuracy = mean([(item.rows, item.accuracy) for item in bins])
    return Bin(bins[0].low, bins[0].high, rows, confidence, accuracy)
