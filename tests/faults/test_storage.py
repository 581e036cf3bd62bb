"""storage.py alone, on a failing disk and under power cuts; and the simulated disks detect missing syncs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from redistill_cache.errors import Refused
from redistill_cache.storage import EXCLUSIVE_RENAME, HARD_LINKS, LOCAL, Files, is_leftover

from tests.faults.failing_disk import FAILURES, FailingDisk, Failure
from tests.faults.no_links import NoLinks
from tests.faults.power_cut import DiskModel, PowerCut, PowerCutDisk

OLD, NEW = b"old" * 300, b"new" * 500


def visible(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not is_leftover(path)}


def try_publish(disk: Files, path: Path, exclusive: bool) -> OSError | None:
    try:
        disk.publish(path, NEW, exclusive=exclusive)
    except OSError as error:
        return error
    return None


class FailingWithoutLinks(FailingDisk):
    def link(self, old: Path, new: Path) -> None:
        NoLinks().link(old, new)


@pytest.mark.parametrize("disk_type", [FailingDisk, FailingWithoutLinks])
@pytest.mark.parametrize("exclusive", [False, True], ids=["replace", "exclusive"])
@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_publish_is_all_or_nothing_on_a_failing_disk(
    tmp_path: Path, failure: Failure, exclusive: bool, disk_type: type[FailingDisk]
):
    for nth in range(1, 20):
        folder = tmp_path / str(nth)
        folder.mkdir()
        if not exclusive:
            (folder / "file").write_bytes(OLD)
        disk = disk_type(nth, failure)
        error = try_publish(disk, folder / "file", exclusive)
        if error is None:
            assert not disk.failed, "a failure was swallowed"
            assert visible(folder) == {"file": NEW}
            assert nth > 3
            return
        assert error.errno == failure.code
        assert visible(folder).get("file") in (NEW, None if exclusive else OLD)
    pytest.fail("publish never completed without a failure")


@pytest.mark.parametrize("first", [LOCAL, NoLinks()], ids=["links", "renames"])
@pytest.mark.parametrize("second", [LOCAL, NoLinks()], ids=["links", "renames"])
def test_only_one_of_two_exclusive_writes_succeeds(tmp_path: Path, first: Files, second: Files):
    first.publish(tmp_path / "file", OLD, exclusive=True)
    with pytest.raises(FileExistsError):
        second.publish(tmp_path / "file", NEW, exclusive=True)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
    assert (tmp_path / "file").read_bytes() == OLD


def test_a_disk_without_links_and_exclusive_renames_is_refused(tmp_path: Path):
    assert (LOCAL.exclusive_by(tmp_path), NoLinks().exclusive_by(tmp_path)) == (HARD_LINKS, EXCLUSIVE_RENAME)
    neither = NoLinks(renames=False)
    with pytest.raises(Refused, match="supports neither hard links"):
        neither.exclusive_by(tmp_path)
    with pytest.raises(Refused, match="supports neither hard links"):
        neither.publish(tmp_path / "file", NEW, exclusive=True)
    assert not list(tmp_path.iterdir())


class SweptByAnother(Files):
    """Another process removes each of the first `times` temporary files just before this one uses it."""

    def __init__(self, times: int) -> None:
        self.times = times

    def _sweep(self, temporary: Path) -> None:
        if self.times:
            self.times -= 1
            temporary.unlink()

    def rename(self, old: Path, new: Path) -> None:
        self._sweep(old)
        super().rename(old, new)

    def link(self, old: Path, new: Path) -> None:
        self._sweep(old)
        super().link(old, new)

    def rename_exclusively(self, old: Path, new: Path) -> None:
        self._sweep(old)
        super().rename_exclusively(old, new)

    def remove(self, path: Path) -> None:
        self._sweep(path)
        super().remove(path)


class SweptWithoutLinks(SweptByAnother, NoLinks):
    def __init__(self, times: int) -> None:
        SweptByAnother.__init__(self, times)
        NoLinks.__init__(self)

    def link(self, old: Path, new: Path) -> None:
        NoLinks.link(self, old, new)


@pytest.mark.parametrize("disk", [SweptByAnother, SweptWithoutLinks])
@pytest.mark.parametrize("exclusive", [False, True], ids=["replace", "exclusive"])
def test_publish_survives_the_sweep_of_another_process(tmp_path: Path, disk: type[SweptByAnother], exclusive: bool):
    for times in (1, 2, 3):
        path = tmp_path / f"file{times}"
        disk(times).publish(path, NEW, exclusive=exclusive)
        assert path.read_bytes() == NEW
    with pytest.raises(FileNotFoundError):
        disk(1000).publish(tmp_path / "never", NEW, exclusive=exclusive)
    with pytest.raises(FileNotFoundError):
        LOCAL.publish(tmp_path / "missing folder" / "file", NEW, exclusive=exclusive)
    assert not any(is_leftover(path) for path in tmp_path.iterdir())


def cut_publish(folder: Path, disk_type: type[PowerCutDisk], seed: int) -> tuple[bool, bytes | None]:
    """Publish NEW over OLD with a power cut at a random moment: (whether publish returned, the content afterwards)."""
    rng = random.Random(seed)
    mount = folder / f"mount{seed}"
    mount.mkdir()
    (mount / "file").write_bytes(OLD)
    model = DiskModel.of_tree(mount)
    disk = disk_type(mount, cut_at=rng.randint(0, 7))
    returned = True
    try:
        disk.publish(mount / "file", NEW)
    except PowerCut:
        returned = False
    for operation in disk.log:
        model.apply(operation)
    model.write_random_state(folder / f"after{seed}", rng)
    return returned, visible(folder / f"after{seed}").get("file")


def test_publish_survives_power_cuts(tmp_path: Path):
    outcomes = set()
    for seed in range(300):
        returned, content = cut_publish(tmp_path, PowerCutDisk, seed)
        assert content == NEW if returned else content in (OLD, NEW), f"seed {seed}: torn or lost"
        outcomes.add((returned, content == NEW))
    assert outcomes == {(True, True), (False, True), (False, False)}, "the model must produce every possible outcome"


class NoFileSync(PowerCutDisk):
    def sync_file(self, path: Path) -> None: ...


class NoDirectorySync(PowerCutDisk):
    def sync_directory(self, path: Path) -> None: ...


@pytest.mark.parametrize("careless", [NoFileSync, NoDirectorySync])
def test_the_model_catches_a_missing_sync(tmp_path: Path, careless: type[PowerCutDisk]):
    outcomes = [cut_publish(tmp_path, careless, seed) for seed in range(100)]
    torn = [content not in (OLD, NEW) for _, content in outcomes]
    lost = [returned and content == OLD for returned, content in outcomes]
    assert any(torn) if careless is NoFileSync else any(lost)


def test_new_directories_survive_power_cuts(tmp_path: Path):
    disk = PowerCutDisk(tmp_path)
    disk.make_directories(tmp_path / "a" / "b" / "c")
    disk.publish(tmp_path / "a" / "b" / "c" / "file", NEW)
    for seed in range(50):
        model = DiskModel()
        for operation in disk.log:
            model.apply(operation)
        after = tmp_path / f"after{seed}"
        model.write_random_state(after, random.Random(seed))
        assert (after / "a" / "b" / "c" / "file").read_bytes() == NEW, f"seed {seed}"


def test_the_simulated_disks_cover_every_operation():
    """An operation added to `Files` must also be added to the failing disk and the power cut."""
    compositions = {"make_directories", "publish", "exclusive_by"}
    primitives = {name for name in vars(Files) if not name.startswith("_")} - compositions
    assert primitives <= vars(FailingDisk).keys()
    assert primitives <= vars(PowerCutDisk).keys()
