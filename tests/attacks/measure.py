"""Call every entry point of the library with one hostile archive in its own process; measure time and memory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from redistill_cache.errors import RedistillError
from redistill_cache.inspect import describe
from redistill_cache.reader import Archive, open_archive
from redistill_cache.verify import verify
from redistill_cache.writer import ArchiveWriter

__all__ = ["ENTRY_POINTS", "Outcome", "measure", "run_entry_point"]


def read_everything(archive: Archive) -> None:
    assert len(list(archive.keys)) == archive.num_samples
    assert len(archive.labels) == len(archive.digests) == len(archive.sizes) == archive.num_samples
    for view in range(archive.num_views):
        rows = archive.rows_available(view) if archive.teachers else []
        for name, teacher in archive.teachers.items():
            for signal in teacher.signals:
                archive.features(view, rows, layer=signal.name, teacher=name)
                if archive.complete:
                    archive.load_view(view, name, signal.name).decode(rows)
        archive.view_params(view, rows)
        if archive.spec.canaries_per_view and archive.complete:
            archive.canaries(view)


def open_and_inspect(path: Path, *, partial: bool) -> None:
    archive = open_archive(path, allow_partial=partial)
    read_everything(archive)
    describe(archive)


def verify_all(path: Path) -> None:
    report = verify(path, full=True)
    if report.damaged:
        raise RedistillError(f"{len(report.damaged)} damaged: {report.damaged[0]}")


ENTRY_POINTS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: open_and_inspect(path, partial=False),
    "open partial": lambda path: open_and_inspect(path, partial=True),
    "verify": verify_all,
    "resume": lambda path: ArchiveWriter.resume(path).seal(),
}


class Outcome(NamedTuple):
    """The outcome of one entry point. `result` is the error message, or "accepted"."""

    entry_point: str
    result: str
    seconds: float
    megabytes: float
    outside: list[str]  # files opened outside of the archive


def run_entry_point(path: Path, entry_point: str) -> str:
    try:
        ENTRY_POINTS[entry_point](path)
    except RedistillError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def start_peak() -> Callable[[], float]:
    """A function that returns the peak memory of this process since this call, in MB above the current amount.

    It resets the kernel's high-water mark, because ru_maxrss of a process starts at that of its parent.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = megabytes("VmRSS")
    return lambda: megabytes("VmHWM") - before


def megabytes(mark: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(f"{mark}:")[2].split()[0]) / 1024


def measure(path: Path, cache: Path, parent: Connection) -> None:
    """The body of a process: run all entry points, one after another."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    outside: list[str] = []
    home, inside = os.path.realpath(path.parent), os.path.realpath(path) + os.sep

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            file = os.path.abspath(os.fspath(arguments[0]))  # noqa: PTH100  must not follow links
            folder = os.path.realpath(os.path.dirname(file)) + os.sep  # noqa: PTH120  as text, too
            is_outside = folder.startswith(home) and not folder.startswith((inside, os.path.realpath(cache)))
            if is_outside and file != str(path):
                outside.append(file)

    sys.addaudithook(watch)
    for entry_point in ENTRY_POINTS:
        peak, start = start_peak(), time.process_time()
        result = run_entry_point(path, entry_point)
        parent.send(Outcome(entry_point, result, time.process_time() - start, peak(), list(outside)))
