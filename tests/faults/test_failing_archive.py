"""Each write, fsync and rename of an archive fails in turn: reads are correct or refused, and a rerun completes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from redistill_cache.errors import RedistillError
from redistill_cache.storage import Files

from tests.faults.failing_disk import FAILURES, FailingDisk, Failure
from tests.faults.scenario import count_correct_rows, hashes, leftovers, write_archive


def count_operations(path: Path) -> int:
    disk = FailingDisk(10**9, FAILURES[0])
    write_archive(path, disk)
    return disk.operations


def attempt(path: Path, disk: Files) -> str | RedistillError:
    try:
        return write_archive(path, disk)
    except RedistillError as error:
        return error


def fail_once(path: Path, nth: int, failure: Failure, reference: tuple[str, dict[str, str]]) -> None:
    disk = FailingDisk(nth, failure)
    where = f"operation {nth}, {failure}"
    outcome = attempt(path, disk)
    if isinstance(outcome, RedistillError):
        assert disk.failed, where
        assert str(path) in str(outcome), where
        assert "\n" not in str(outcome), where
    else:  # only failures of cleaning up may be ignored; the archive must be complete
        assert outcome == reference[0], where
    try:
        count_correct_rows(path, partial=True)
    except RedistillError:
        assert disk.failed, where
    assert write_archive(path, Files()) == reference[0], where
    assert hashes(path) == reference[1], where
    assert not leftovers(path), where
    shutil.rmtree(path)


pytestmark = pytest.mark.usefixtures("_shards_encoded_once")


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_some_operations_fail(ram: Path, failure: Failure, reference: tuple[str, dict[str, str]]):
    total = count_operations(ram / "count")
    assert total > 200
    offset = FAILURES.index(failure) * 11
    for nth in range(1 + offset, total + 1, 59):
        fail_once(ram / "a.redistill.zarr", nth, failure, reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_every_operation_fails(ram: Path, failure: Failure, reference: tuple[str, dict[str, str]]):
    for nth in range(1, count_operations(ram / "count") + 1):
        fail_once(ram / "a.redistill.zarr", nth, failure, reference)
