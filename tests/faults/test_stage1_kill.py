"""kill -9 of `redistill cache-teacher` with all its processes; the same command then completes the archive.

Most runs are forked from a server that has imported everything; some are started by the full command, with workers.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import redistill_cache
from redistill_cache.errors import Incomplete
from redistill_cache.verify import verify

from redistill.caching import cache_teacher
from tests.stage1 import cache_options, command_line, file_hashes, start_command

SECONDS = 240
BLOCKS = {"block_rows": 8, "views": 2}
PER_ARCHIVE = 10
FileStamps = dict[str, tuple[int, int]]  # inode and modification time by path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "a.zarr"
    cache_teacher(cache_options(path, **BLOCKS))
    return path


class Run:
    """The command in its own process group."""

    def __init__(self, path: Path, real: bool) -> None:
        self.output = path.with_suffix(".txt")
        if real:
            with self.output.open("w") as file:
                command = [sys.executable, "-m", "redistill_cli", *command_line(path, **BLOCKS | {"workers": 1})]
                self.popen = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            self.pid, self.code = self.popen.pid, self.popen.poll
            self.wait: Callable[[], object] = lambda: self.popen.wait(SECONDS)
        else:
            forked = start_command(
                command_line(path, **BLOCKS), self.output, XDG_CACHE_HOME=os.environ["XDG_CACHE_HOME"]
            )
            assert forked.pid is not None
            self.pid, self.code, self.wait = forked.pid, lambda: forked.exitcode, lambda: forked.join(SECONDS)

    def kill_when(self, due: Callable[[], bool]) -> bool:
        """Kill the process group once `due()` is true. True if it was still running."""
        while self.code() is None and not due():
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or not a group of its own yet
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait()
        assert self.code() in (0, -signal.SIGKILL), self.output.read_text()
        return self.code() != 0


def moment_of(rng: random.Random, path: Path, whole: Path, duration: float) -> tuple[str, Callable[[], bool]]:
    """A moment to kill, as text and as a condition: at random, at a number of files, or around the seal."""
    began, count_now, total = time.monotonic(), entries(path), entries(whole)
    kind = rng.choices(["time", "files", "seal"], [2, 6, 2])[0]
    if kind == "time":
        delay = rng.random() * duration
        return f"{delay:.3f} s", lambda: time.monotonic() > began + delay
    if kind == "files":
        count = min(count_now + rng.randint(1, total // 4), total - 2)
        return f"{count} of {total} files", lambda: entries(path) >= count
    records = len(list((whole / "_redistill/blocks").iterdir()))
    delay = rng.random() * 0.02
    seen: list[float] = []

    def sealing() -> bool:
        with contextlib.suppress(FileNotFoundError):
            if not seen and len(list((path / "_redistill/blocks").iterdir())) >= records:
                seen.append(time.monotonic())
        return bool(seen) and time.monotonic() > seen[0] + delay

    return f"{delay:.3f} s after the last block", sealing


def entries(path: Path) -> int:
    return sum(1 for _ in path.rglob("*"))


def check_killed(path: Path, whole: Path, committed_before: FileStamps) -> None:
    """Every available row is correct, and no committed file was lost or written again."""
    now = committed(path)
    assert committed_before.items() <= now.items(), "a committed file was lost or written again"
    committed_before |= now
    with contextlib.suppress(Incomplete, redistill_cache.errors.Refused):  # too early to be opened
        archive, expected = redistill_cache.open_archive(path, allow_partial=True), redistill_cache.open_archive(whole)
        for view in range(archive.num_views):
            rows = archive.rows_available(view)
            if len(rows):
                assert np.array_equal(archive.logits(view, rows), expected.logits(view, rows))


def committed(path: Path) -> FileStamps:
    """Inode and modification time of the files of committed blocks."""
    stamps = {}
    for record in (path / "_redistill/blocks").glob("*.json"):
        for name in [str(record.relative_to(path)), *(item[0] for item in json.loads(record.read_bytes())["files"])]:
            with contextlib.suppress(FileNotFoundError):  # committed, and renamed into place by the next run
                status = (path / name).stat()
                stamps[name] = status.st_ino, status.st_mtime_ns
    return stamps


def kill_often(folder: Path, whole: Path, kills: int, real_every: int | None = None) -> None:
    seed = int(os.environ.get("REDISTILL_SEED", "20261121"))
    print(f"replay with REDISTILL_SEED={seed}")
    rng, killed, archives = random.Random(seed), 0, 0
    start = time.monotonic()
    assert not Run(folder / "duration.zarr", real=False).kill_when(lambda: False)
    duration = time.monotonic() - start
    assert file_hashes(folder / "duration.zarr") == file_hashes(whole)
    while killed < kills:
        path, committed_before = folder / f"{archives}.zarr", FileStamps()
        for _ in range(min(PER_ARCHIVE, kills - killed)):
            real = real_every is not None and rng.randrange(real_every) == 0
            moment, due = moment_of(rng, path, whole, duration)
            was_killed = Run(path, real).kill_when(due)
            print(f"archive {archives}: {'killed' if was_killed else 'finished'} at {moment}{', with workers' * real}")
            check_killed(path, whole, committed_before)
            killed += was_killed
            if not was_killed:
                break
        assert not Run(path, real=False).kill_when(lambda: False)
        check_killed(path, whole, committed_before)
        assert file_hashes(path) == file_hashes(whole)
        assert not list(path.rglob("*.partial"))
        assert verify(path, full=True).ok
        archives += 1
    print(f"{killed} kills, {archives} archives, all equal to the uninterrupted one")


@pytest.mark.timeout(900)
def test_killed_runs(ram: Path, uninterrupted: Path):
    kill_often(ram, uninterrupted, 3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_killed_runs(ram: Path, uninterrupted: Path):
    kill_often(ram, uninterrupted, 200, real_every=10)
