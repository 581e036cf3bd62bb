"""kill -9 of real writers: at random moments, and aimed between any two operations on the disk."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import redistill_cache
from redistill_cache.errors import Incomplete

from tests.faults.failing_disk import FAILURES, FailingDisk
from tests.faults.scenario import believed_rows, hashes, leftovers, write_archive
from tests.faults.writer_process import start_writer

Reference = tuple[str, dict[str, str]]
SECONDS = 60


def hear(pipe: Connection) -> list[str]:
    """Everything a process says until it is gone; a word it was killed in the middle of does not count."""
    said = []
    while pipe.poll(SECONDS):
        try:
            said.append(pipe.recv())
        except (EOFError, OSError):
            return said
    raise TimeoutError(f"the writer has said nothing for {SECONDS} s, and lives")


def kill_at_random(path: Path, delay: float) -> list[str]:
    process, pipe = start_writer(path)
    with pipe:
        assert pipe.poll(SECONDS)
        said = [pipe.recv()]
        time.sleep(delay)
        process.kill()
        said += hear(pipe)
    process.join()
    return said


def kill_at_operation(path: Path, fatal: int) -> list[str]:
    process, pipe = start_writer(path, fatal)
    with pipe:
        said = hear(pipe)
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"operation {fatal} was never reached"
    return said


def check_after(path: Path, said: list[str], reference: Reference) -> bool:
    """Nothing that was promised is lost, nothing wrong is believed, and the next run ends the same. Was it early?"""
    records = [word for word in said if word.endswith(".json")]
    if records:
        committed = redistill_cache.open_archive(path, allow_partial=True).state
        lost = [record for record in records if not (path / record).exists()]
        assert not lost, f"committed and gone: {lost}"
        held = committed.committed
        assert held is None or len(held) >= len(records) + 2, "the sample index and the side data came before"
        believed_rows(path, partial=True)
    early = reference[0] not in said
    if early and records:
        with contextlib.suppress(Incomplete):  # or it was killed after the manifest, before it could say so
            believed_rows(path)
    assert write_archive(path) == reference[0]
    assert hashes(path) == reference[1]
    assert not leftovers(path)
    return early


def kill_often(folder: Path, times: int, reference: Reference) -> None:
    seed = int(os.environ.get("REDISTILL_SEED", "20261121"))
    print(f"replay with REDISTILL_SEED={seed}")
    rng = random.Random(seed)
    disk = FailingDisk(10**9, FAILURES[0])
    write_archive(folder / "count.redistill.zarr", disk)
    kill_at_random(folder / "pace.redistill.zarr", 0.0)
    start = time.monotonic()
    process, pipe = start_writer(folder / "pace.redistill.zarr")
    with pipe:
        assert reference[0] in hear(pipe)
    process.join()
    pace = time.monotonic() - start
    early = []
    for i in range(times):
        path = folder / f"{i}.redistill.zarr"
        aimed = rng.random() < 0.5
        moment = rng.randint(1, disk.operations) if aimed else rng.random() * pace
        print(f"kill {i} at {f'operation {moment}' if aimed else f'{moment:.3f} s'}")
        said = kill_at_operation(path, int(moment)) if aimed else kill_at_random(path, moment)
        early.append(check_after(path, said, reference))
    assert sum(early) > times / 2, "most kills must come while the archive is written"


def test_killed_writers(ram: Path, reference: Reference):
    kill_often(ram, 24, reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_killed_writers(ram: Path, reference: Reference):
    kill_often(ram, 200, reference)
