"""kill -9 of real writers: at random moments, and between any two operations on the disk."""

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
from tests.faults.scenario import count_correct_rows, hashes, leftovers, write_archive
from tests.faults.writer_process import start_writer

Reference = tuple[str, dict[str, str]]
SECONDS = 240


def receive_all(pipe: Connection) -> list[str]:
    """All complete messages of a process until it ends."""
    messages = []
    while pipe.poll(SECONDS):
        try:
            messages.append(pipe.recv())
        except (EOFError, OSError):
            return messages
    raise TimeoutError(f"no message for {SECONDS} s from a running writer")


def kill_at_random(path: Path, delay: float) -> list[str]:
    process, pipe = start_writer(path)
    with pipe:
        assert pipe.poll(SECONDS)
        messages = [pipe.recv()]
        time.sleep(delay)
        process.kill()
        messages += receive_all(pipe)
    process.join()
    return messages


def kill_at_operation(path: Path, fatal: int) -> list[str]:
    process, pipe = start_writer(path, fatal)
    with pipe:
        messages = receive_all(pipe)
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"operation {fatal} was never reached"
    return messages


def check_after(path: Path, messages: list[str], reference: Reference) -> bool:
    """No committed block is lost, reads are correct, the next run completes. True if killed before the end."""
    records = [message for message in messages if message.endswith(".json")]
    if records:
        state = redistill_cache.open_archive(path, allow_partial=True).state
        lost = [record for record in records if not (path / record).exists()]
        assert not lost, f"committed and lost: {lost}"
        blocks = state.committed
        assert blocks is None or len(blocks) >= len(records) + 2, (
            "the sample index and the side data are committed first"
        )
        count_correct_rows(path, partial=True)
    early = reference[0] not in messages
    if early and records:
        with contextlib.suppress(Incomplete):  # it may have been killed after the manifest and before sending the id
            count_correct_rows(path)
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
    kill_at_random(folder / "duration.redistill.zarr", 0.0)
    start = time.monotonic()
    process, pipe = start_writer(folder / "duration.redistill.zarr")
    with pipe:
        assert reference[0] in receive_all(pipe)
    process.join()
    duration = time.monotonic() - start
    early = []
    for i in range(times):
        path = folder / f"{i}.redistill.zarr"
        at_operation = rng.random() < 0.5
        moment = rng.randint(1, disk.operations) if at_operation else rng.random() * duration
        print(f"kill {i} at {f'operation {moment}' if at_operation else f'{moment:.3f} s'}")
        messages = kill_at_operation(path, int(moment)) if at_operation else kill_at_random(path, moment)
        early.append(check_after(path, messages, reference))
    assert sum(early) > times / 2, "most kills must come while the archive is written"


@pytest.mark.timeout(900)
def test_killed_writers(ram: Path, reference: Reference):
    kill_often(ram, 10, reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_killed_writers(ram: Path, reference: Reference):
    kill_often(ram, 200, reference)
