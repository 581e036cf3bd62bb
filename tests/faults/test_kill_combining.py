"""kill -9 of skeleton, merge and subset between any two operations on the disk; then the same call ends as usual."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import open_archive
from redistill_cache.combining import merge, plan_merge, skeleton
from redistill_cache.errors import Incomplete, NotAnArchive, Refused
from redistill_cache.storage import LOCAL, Files
from redistill_cache.subsets import plan_subset, write_subset

from tests import tiny_archive
from tests.faults.failing_disk import FAILURES, FailingDisk, Failure
from tests.faults.scenario import hashes, leftovers
from tests.faults.writer_process import SelfKillingFiles, context
from tests.tiny_archive import block_data, fill

SEED = int(os.environ.get("REDISTILL_SEED", "20261126"))
SPEC = replace(tiny_archive.SPEC, num_samples=12, num_views=2, block_rows=8)
TEACHERS = ("tiny", "other")


def make_halves(folder: Path) -> None:
    """An archive with two teachers, and two archives with half of its blocks each."""
    tiny_archive.make(folder / "whole", SPEC, TEACHERS)
    first = tiny_archive.start(folder / "a", SPEC, TEACHERS)
    skeleton(first.path, folder / "b")
    for index, name in enumerate("ab"):
        writer = type(first).resume(folder / name)
        fill(writer, ["views", "canaries"])
        for part in (f"teachers/{teacher}" for teacher in TEACHERS):
            for block in writer.missing(part)[index::2]:
                writer.write(block, *block_data(block, SPEC))


def run_skeleton(folder: Path, out: Path, files: Files = LOCAL) -> None:
    skeleton(folder / "a", out, files=files)


def run_merge(folder: Path, out: Path, files: Files = LOCAL) -> None:
    merge(plan_merge([folder / "a", folder / "b"], out), files=files)


def run_subset_of_rows(folder: Path, out: Path, files: Files = LOCAL) -> None:
    rows = np.array([0, 3, 4, 7, 8, 9, 10, 11])
    write_subset(plan_subset(open_archive(folder / "whole"), out, (1,), rows), files=files)


def run_subset_of_views(folder: Path, out: Path, files: Files = LOCAL) -> None:
    write_subset(plan_subset(open_archive(folder / "whole"), out, (1,)), files=files)


COMMANDS: dict[str, Callable[..., None]] = {
    "skeleton": run_skeleton,
    "merge": run_merge,
    "rows": run_subset_of_rows,
    "views": run_subset_of_views,
}


def run_and_die(command: str, folder: Path, out: Path, fatal: int) -> None:
    COMMANDS[command](folder, out, SelfKillingFiles(fatal))


@pytest.fixture
def folder(ram: Path) -> Path:
    make_halves(ram)
    return ram


def count_operations(command: str, folder: Path) -> int:
    disk = FailingDisk(0, FAILURES[0])
    COMMANDS[command](folder, folder / "counted", disk)
    return disk.operations


def check_what_is_there(command: str, folder: Path, out: Path, expected: dict[str, str]) -> None:
    """A finished archive, an unfinished one, or none."""
    try:
        archive = open_archive(out, verify="full")
    except (Incomplete, NotAnArchive):
        assert not (out / "_redistill/manifest.json").exists()
        if command == "skeleton":
            assert not out.exists() or hashes(out) == expected
        return
    assert archive.complete
    assert hashes(out).items() >= expected.items()


def check_kills(command: str, folder: Path, fatal_operations: Sequence[int]) -> None:
    COMMANDS[command](folder, folder / "expected")
    expected = hashes(folder / "expected")
    if command == "merge":
        assert expected == hashes(folder / "whole")
    for fatal in fatal_operations:
        out = folder / f"out-{fatal}"
        for number in (fatal, max(1, fatal // 2)):  # the second call is killed as well
            process = context().Process(target=run_and_die, args=(command, folder, out, number))
            process.start()
            process.join(240)
            assert process.exitcode in (-signal.SIGKILL, 0), f"operation {number}"
            assert process.exitcode == -signal.SIGKILL or number != fatal, f"operation {fatal} was never reached"
            check_what_is_there(command, folder, out, expected)
        COMMANDS[command](folder, out)
        assert hashes(out) == expected, f"killed before operation {fatal}"
        assert not leftovers(folder)
        shutil.rmtree(out)


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_an_operation(folder: Path, command: str):
    print(f"replay with REDISTILL_SEED={SEED}")
    count = count_operations(command, folder)
    check_kills(command, folder, [random.Random(f"{SEED} {command}").randrange(1, count + 1)])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_every_operation(folder: Path, command: str):
    check_kills(command, folder, range(1, count_operations(command, folder) + 1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_every_error_of_the_disk_is_one_line_and_the_same_call_continues(folder: Path, command: str, failure: Failure):
    COMMANDS[command](folder, folder / "expected")
    expected = hashes(folder / "expected")
    for nth in range(1, count_operations(command, folder) + 1):
        out, disk = folder / f"out-{nth}", FailingDisk(nth, failure)
        try:
            COMMANDS[command](folder, out, disk)
        except Refused as error:
            lines = str(error).splitlines()
            check_what_is_there(command, folder, out, expected)
            COMMANDS[command](folder, out)
            assert len(lines) == 1
        assert disk.failed
        assert hashes(out) == expected, f"operation {nth} failed"
        assert not leftovers(folder)
        shutil.rmtree(out)
