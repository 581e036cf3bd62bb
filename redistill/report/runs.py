"""Finished runs, read from their folders and grouped by what they minimised."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redistill_cache.errors import Refused

from redistill.training.options import loss_name
from redistill.training.outcome import RESULT

__all__ = ["Group", "Run", "group_runs", "read_runs", "spread"]


@dataclass(frozen=True)
class Run:
    """One student: what it was, how it went, what came of it."""

    folder: Path
    student: str
    loss: str
    seed: int
    archive_id: str | None
    result: dict[str, Any]
    history: tuple[dict[str, float], ...]

    @property
    def evaluation(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.result.get("evaluation")
        return found


@dataclass(frozen=True)
class Group:
    """The seeds of one student, loss and archive."""

    name: str
    runs: tuple[Run, ...]

    def values(self, key: str) -> list[float]:
        """A number of every run that has it."""
        found = (run.result.get(key) for run in self.runs)
        return [float(value) for value in found if value is not None]

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


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and standard deviation."""
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, and in the folders of these cohorts."""
    found: list[Run] = []
    for folder in folders:
        inner = sorted(path.parent for path in folder.glob(f"*/{RESULT}")) if folder.is_dir() else []
        if (folder / RESULT).is_file():
            found.append(read_run(folder))
        elif inner:
            found += [read_run(path) for path in inner]
        elif (folder / "last.ckpt").exists():
            raise Refused(f"{folder} is a run that is not finished; run its command again to go on")
        else:
            raise Refused(f"{folder} is no run: expected a folder with {RESULT}, as redistill train leaves it")
    if not found:
        raise Refused("no run was given; a report needs at least one")
    return found


def read_run(folder: Path) -> Run:
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            history = [numbers(row) for row in csv.DictReader(file)]
        return Run(
            folder=folder,
            student=str(result["student"]),
            loss=str(result["loss"]),
            seed=int(result["seed"]),
            archive_id=result["archive_id"],
            result=result,
            history=tuple(history),
        )
    except FileNotFoundError as error:
        raise Refused(f"{folder}: {Path(error.filename).name} is missing; was the run made with --log csv?") from None
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise Refused(f"{folder} does not hold a readable run: {type(error).__name__} {error}") from None


def numbers(row: dict[str, str | None]) -> dict[str, float]:
    """The columns of a line that hold a number."""
    found = {}
    for name, text in row.items():
        try:
            found[name] = float(text or "")
        except ValueError:
            continue  # the name of views, or a measure that was not taken
    if "epoch" not in found:
        raise ValueError("metrics.csv has a line without an epoch")
    return found


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in nothing but the seed belong together; names say what tells groups apart."""
    keys = list(dict.fromkeys((run.student, run.loss, run.archive_id) for run in runs))
    several_students = len({student for student, *_ in keys}) > 1
    archives = list(dict.fromkeys(archive for *_, archive in keys))
    groups = []
    for student, loss, archive in keys:
        same = [k for k in keys if loss_name(k[1]) == loss_name(loss) and k[0] == student and k[2] == archive]
        parts = [student.partition("?")[0]] if several_students else []
        parts.append(loss_name(loss) if len(same) == 1 else loss)
        members = tuple(run for run in runs if (run.student, run.loss, run.archive_id) == (student, loss, archive))
        if archive != archives[0]:  # the folder of the cohort says more than an id
            parts.append(members[0].folder.parent.name or f"archive {(archive or 'unsealed')[:6]}")
        groups.append(Group(", ".join(parts), members))
    return groups
