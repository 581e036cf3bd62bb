"""Runs, read from the folders that `redistill train` leaves. A run that cannot be read is one line, never a guess."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redistill_cache import strict_json
from redistill_cache.errors import RedistillError, Refused

from redistill.calibration import Bin
from redistill.training.config import CONFIG, read_config
from redistill.training.options import loss_name
from redistill.training.outcome import RESULT

__all__ = ["METRICS", "Found", "Run", "Unfinished", "read_runs"]

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
class Run:
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

    runs: tuple[Run, ...]
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


def read_run(folder: Path) -> Run:
    try:
        result = strict_json.parse((folder / RESULT).read_bytes(), cap=MAX_RESULT, where=RESULT)
        history = read_history(folder / METRICS)
        return run_of(folder, result, read_config(folder / CONFIG), history)
    except (RedistillError, OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise Refused(f"{folder} does not hold a readable run: {reason}; train it again, or leave it out") from None


def run_of(folder: Path, result: Any, options: Mapping[str, Any], history: tuple[Mapping[str, float], ...]) -> Run:  # noqa: ANN401  JSON of anybody
    result = expect(result, dict, RESULT)
    evaluation = expect(result["evaluation"] or {}, dict, "evaluation")
    beside = expect(evaluation.get("teacher") or {}, dict, "teacher")
    archive = result["archive_id"]
    return Run(
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
