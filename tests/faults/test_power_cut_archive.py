"""Power cuts while an archive is written: the surviving files are opened and resumed, and give the same archive.

The operations of one uninterrupted run are logged once; a seed then decides where they end and what survives:

    cut            one power cut
    cut twice      a second one while the archive is being resumed
    killed, cut    a writer is killed, another one resumes without a reboot, then the power is cut
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import redistill_cache
from redistill_cache.errors import RedistillError
from redistill_cache.layout import Block

from tests.faults.power_cut import DiskModel, Operation, PowerCut, PowerCutDisk
from tests.faults.scenario import count_correct_rows, hashes, leftovers, write_archive

pytestmark = pytest.mark.usefixtures("_shards_encoded_once")

NAME = "a.redistill.zarr"
Reference = tuple[str, dict[str, str]]


@dataclass(frozen=True)
class Run:
    """An uninterrupted run: its operations, and how many of them precede the return of each block's write."""

    operations: list[Operation]
    committed: list[tuple[int, Block]]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    disk = PowerCutDisk(tmp_path_factory.mktemp("mount"))
    committed: list[tuple[int, Block]] = []
    write_archive(disk.mount / NAME, disk, lambda block: committed.append((len(disk.log), block)))
    return Run(disk.log, committed)


def is_complete(path: Path) -> bool:
    """Whether the archive opens as complete. AssertionError for a wrong value."""
    try:
        count_correct_rows(path, partial=True)
        count_correct_rows(path)
    except RedistillError:
        return False
    return True


def resume_until_cut(mount: Path, model: DiskModel, cut_at: int) -> str | None:
    """Resume on a real disk, mirrored in its model. The id, or None if the power was cut before the end."""
    disk = PowerCutDisk(mount, cut_at)
    try:
        return write_archive(mount / NAME, disk)
    except PowerCut:
        return None
    finally:
        for operation in disk.log:
            model.apply(operation)


def check_power_cut(seed: int, run: Run, folder: Path, reference: Reference) -> bool:
    """Apply the faults of one seed, check the archive, and return whether it was complete after them."""
    rng = random.Random(seed)
    operations = rng.randint(0, len(run.operations))
    model = DiskModel()
    for operation in run.operations[:operations]:
        model.apply(operation)
    kind, mount, after = seed % 3, folder / "mount", folder / "after"
    committed = [block for count, block in run.committed if count <= operations]
    sealed = False
    if kind == 2:
        model.write_current(mount)
        # The second writer has less to do; half the time it finishes before the power cut.
        sealed = resume_until_cut(mount, model, rng.randint(0, 2 * len(run.operations) - 2 * operations)) is not None
    elif kind == 1:
        model.write_random_state(mount, rng)
        model = DiskModel.of_tree(mount)
        sealed = resume_until_cut(mount, model, rng.randint(0, 200)) is not None
    model.write_random_state(after, rng)
    check_committed(after / NAME, committed, sealed, reference, f"seed {seed}")
    complete = is_complete(after / NAME)
    assert write_archive(after / NAME) == reference[0], f"seed {seed}: another id"
    assert hashes(after / NAME) == reference[1], f"seed {seed}: other files"
    assert not leftovers(after / NAME), f"seed {seed}: leftovers"
    shutil.rmtree(mount, ignore_errors=True)
    shutil.rmtree(after)
    return complete


def check_committed(path: Path, committed: list[Block], sealed: bool, reference: Reference, seed: str) -> None:
    """Blocks whose write had returned, and the seal if it had returned, have survived."""
    if sealed:
        assert redistill_cache.open_archive(path).id == reference[0], f"{seed}: a sealed archive is lost"
    if committed:
        state = redistill_cache.open_archive(path, allow_partial=True).state
        lost = [str(block) for block in committed if not state.holds(block)]
        assert not lost, f"{seed}: committed and lost: {lost}"


def test_power_cuts(ram: Path, run: Run, reference: Reference):
    outcomes = [check_power_cut(seed, run, ram, reference) for seed in range(120)]
    assert any(outcomes)
    assert not all(outcomes)


def check_finish_after_kill(folder: Path, run: Run, reference: Reference, kills: range) -> None:
    """A writer is killed, another finishes on the same machine, then a power cut loses everything unsynced."""
    for operations in kills:
        model = DiskModel()
        for operation in run.operations[:operations]:
            model.apply(operation)
        mount, after = folder / "mount", folder / "after"
        model.write_current(mount)
        assert resume_until_cut(mount, model, 10**9) == reference[0]
        model.write_synced_only(after)
        where = f"killed after operation {operations}: {run.operations[operations - 1][:2]}"
        assert hashes(after / NAME) == reference[1], where
        shutil.rmtree(mount)
        shutil.rmtree(after)


def test_unsynced_writes_of_a_killed_writer_are_durable_once_sealed(ram: Path, run: Run, reference: Reference):
    renames = [i for i, (name, *_) in enumerate(run.operations) if name in ("make_directory", "rename", "link")]
    for last in renames[::12]:
        check_finish_after_kill(ram, run, reference, range(last + 1, last + 2))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_unsynced_writes_are_durable_once_sealed_after_a_kill_at_any_operation(
    ram: Path, run: Run, reference: Reference
):
    check_finish_after_kill(ram, run, reference, range(len(run.operations) + 1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", range(20))
def test_ten_thousand_power_cuts(ram: Path, run: Run, reference: Reference, batch: int):
    for seed in range(1000 + batch * 500, 1000 + (batch + 1) * 500):
        check_power_cut(seed, run, ram, reference)
