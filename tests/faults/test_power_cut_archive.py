"""The power goes while an archive is written. What the disk kept is opened, resumed, and must end the same.

The operations of one undisturbed run are logged once; a seed then chooses where to cut them and what survives. Every
fourth time the power goes again while the archive is being resumed.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

import pytest
from redistill_cache.errors import RedistillError

from tests.faults.power_cut import DiskModel, Operation, PowerCut, PowerCutDisk
from tests.faults.scenario import believed_rows, hashes, leftovers, write_archive

NAME = "a.redistill.zarr"


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[Operation]:
    disk = PowerCutDisk(tmp_path_factory.mktemp("mount"))
    write_archive(disk.mount / NAME, disk)
    return disk.log


def believe(path: Path) -> bool:
    """Whether the archive is offered as complete. Wrong values raise AssertionError."""
    try:
        believed_rows(path, partial=True)
        believed_rows(path)
    except RedistillError:
        return False
    return True


def survive(seed: int, log: list[Operation], folder: Path, reference: tuple[str, dict[str, str]]) -> bool:
    rng = random.Random(seed)
    model = DiskModel()
    for operation in log[: rng.randint(0, len(log))]:
        model.apply(operation)
    mount = folder / str(seed)
    model.aftermath(mount, rng)
    if seed % 4 == 0:
        mount = cut_again(mount, rng)
    complete = believe(mount / NAME)
    assert write_archive(mount / NAME) == reference[0], f"seed {seed}: another id"
    assert hashes(mount / NAME) == reference[1], f"seed {seed}: other files"
    assert not leftovers(mount / NAME), f"seed {seed}: leftovers"
    shutil.rmtree(mount)
    return complete


def cut_again(mount: Path, rng: random.Random) -> Path:
    model = DiskModel.of_tree(mount)
    disk = PowerCutDisk(mount, cut_at=rng.randint(0, 200))
    with contextlib.suppress(PowerCut):  # or it was done before the power went
        write_archive(mount / NAME, disk)
    for operation in disk.log:
        model.apply(operation)
    after = mount.with_name(f"{mount.name}-again")
    model.aftermath(after, rng)
    shutil.rmtree(mount)
    return after


def test_power_cuts(tmp_path: Path, log: list[Operation], reference: tuple[str, dict[str, str]]):
    outcomes = [survive(seed, log, tmp_path, reference) for seed in range(60)]
    assert not all(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(20))
def test_ten_thousand_power_cuts(
    tmp_path: Path, log: list[Operation], reference: tuple[str, dict[str, str]], batch: int
):
    for seed in range(1000 + batch * 500, 1000 + (batch + 1) * 500):
        survive(seed, log, tmp_path, reference)
