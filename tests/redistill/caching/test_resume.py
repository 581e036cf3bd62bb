"""An archive is the same to the byte however often it was interrupted, by how many ranks, and on a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import redistill_cache
from redistill_cache import ArchiveWriter
from redistill_cache.combining import merge, plan_merge, skeleton
from redistill_cache.errors import Damaged, Incomplete, Refused, SpecMismatch
from redistill_cache.verify import verify

from redistill.caching import cache_teacher
from redistill.caching.open_archive import check_new_path
from redistill.interrupts import Interrupted
from redistill.progress import NoProgress
from tests.faults.failing_disk import FailingDisk, Failure
from tests.faults.no_links import NoLinks
from tests.stage1 import (
    DATA,
    FIVE_CLASSES,
    OTHER_TEACHER,
    SignalAtBatch,
    cache_options,
    command_line,
    file_hashes,
    five_class_options,
    start_command,
)


@pytest.fixture(scope="module")
def complete_five_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("complete") / "a.zarr"
    cache_teacher(five_class_options(path))
    return path


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("complete") / "a.zarr"
    cache_teacher(cache_options(path))
    return path


@pytest.mark.parametrize("batches", [1, 3, 7])
def test_an_interrupted_run_resumes_to_the_same_bytes(complete_five_classes: Path, tmp_path: Path, batches: int):
    path = tmp_path / "a.zarr"
    with pytest.raises(Interrupted, match="same command") as stop:
        cache_teacher(five_class_options(path), SignalAtBatch(signal.SIGTERM, batches))
    assert stop.value.exit_code == 143
    with pytest.raises(Incomplete):
        redistill_cache.open_archive(path)
    cache_teacher(five_class_options(path))
    assert file_hashes(path) == file_hashes(complete_five_classes)


def test_the_zstd_level_changes_bytes_and_no_value_and_is_kept_on_resume(tmp_path: Path):
    data = {"data": DATA.replace("n=61", "n=600"), "block_rows": 256, "codec": "linear", "views": 1, "batch_size": 64}
    whole, resumed, default = (tmp_path / f"{name}.zarr" for name in ("whole", "resumed", "default"))
    cache_teacher(cache_options(whole, zstd_level=3, **data))
    cache_teacher(cache_options(default, **data))
    first, second = (redistill_cache.open_archive(path) for path in (whole, default))
    assert np.array_equal(first.logits(0), second.logits(0))
    sizes = [sum(len(file.read_bytes()) for file in path.glob("teachers/*/logits/q/c.*")) for path in (whole, default)]
    assert sizes[1] < sizes[0]
    with pytest.raises(Interrupted):
        cache_teacher(cache_options(resumed, zstd_level=3, **data), SignalAtBatch(signal.SIGTERM, 6))
    with pytest.raises(SpecMismatch, match="was started with zstd level 3, now it is 1; leave out --zstd-level"):
        cache_teacher(cache_options(resumed, zstd_level=1, **data))
    cache_teacher(cache_options(resumed, **data))
    assert file_hashes(resumed) == file_hashes(whole)


@pytest.mark.timeout(900)
def test_workers_and_ranks_do_not_change_a_byte(complete_five_classes: Path, tmp_path: Path):
    cache_teacher(five_class_options(tmp_path / "workers.zarr", workers=2))
    assert file_hashes(tmp_path / "workers.zarr") == file_hashes(complete_five_classes)
    arguments = command_line(tmp_path / "ranks.zarr", **FIVE_CLASSES)
    outputs = [tmp_path / f"{rank}.txt" for rank in range(2)]
    ranks = [
        start_command(arguments, outputs[rank], RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.join(240)
    assert [rank.exitcode for rank in ranks] == [0, 0], [output.read_text() for output in outputs]
    assert outputs[1].read_text() == "", "only the first rank of a machine prints"
    assert file_hashes(tmp_path / "ranks.zarr") == file_hashes(complete_five_classes)


class CommitsFromAnotherProcess(NoProgress):
    """After our first batch, another process has committed view 0 but has not yet renamed its files."""

    def __init__(self, path: Path, complete: Path) -> None:
        self.path, self.complete = path, complete

    def advance(self, task: str, *_: object, **__: object) -> None:
        if task != "teacher":
            return
        for record in (self.complete / "_redistill" / "blocks").glob("*.0.?.json"):
            if (self.path / "_redistill" / "blocks" / record.name).exists():
                continue
            for name, _, sha256 in json.loads(record.read_text())["files"]:
                shutil.copy(self.complete / name, self.path / f"{name}.{sha256}.partial")
            shutil.copy(record, self.path / "_redistill" / "blocks")


def test_blocks_committed_by_another_process_are_left_alone(complete_five_classes: Path, tmp_path: Path):
    path = tmp_path / "a.zarr"
    result = cache_teacher(five_class_options(path), CommitsFromAnotherProcess(path, complete_five_classes))
    assert file_hashes(path) == file_hashes(complete_five_classes)
    assert result.images == 90, "only the second view is written by this process"


@pytest.mark.slow
def test_three_commands_started_together_all_finish(complete_five_classes: Path, tmp_path: Path):
    """As a job array does: none is refused because another one was first."""
    path = tmp_path / "a.zarr"
    outputs = [tmp_path / f"{number}.txt" for number in range(3)]
    commands = [start_command(command_line(path, **FIVE_CLASSES), output) for output in outputs]
    for command in commands:
        command.join(240)
    assert [command.exitcode for command in commands] == [0, 0, 0], [output.read_text() for output in outputs]
    assert file_hashes(path) == file_hashes(complete_five_classes)


class AnotherProcessCreates(NoProgress):
    """Another process creates and finishes the archive while this one runs its pilot."""

    def __init__(self, path: Path, complete: Path) -> None:
        self.path, self.complete = path, complete

    def info(self, message: str) -> None:
        if message.startswith("codec of") and not self.path.exists():
            shutil.copytree(self.complete, self.path)


def test_an_archive_created_by_another_process_is_resumed(complete_five_classes: Path, tmp_path: Path):
    path = tmp_path / "a.zarr"
    result = cache_teacher(five_class_options(path), AnotherProcessCreates(path, complete_five_classes))
    assert result.images == 0
    assert file_hashes(path) == file_hashes(complete_five_classes)


def without_links(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_file_system_without_hard_links_gets_the_same_archive(
    complete_five_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "link", without_links)
    cache_teacher(five_class_options(tmp_path / "a.zarr"))
    assert file_hashes(tmp_path / "a.zarr") == file_hashes(complete_five_classes)


def test_a_file_system_without_exclusive_names_is_refused_before_the_teacher_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(check_new_path.__kwdefaults__, "files", NoLinks(renames=False))
    ran = SignalAtBatch(signal.SIGTERM)
    with pytest.raises(Refused, match=r"file system of .* supports neither hard links.*choose an --out"):
        cache_teacher(five_class_options(tmp_path / "a.zarr"), ran)
    assert not list(tmp_path.iterdir())


def test_a_second_run_does_nothing(complete: Path):
    before = {path: path.stat().st_mtime_ns for path in complete.rglob("*") if path.is_file()}
    result = cache_teacher(cache_options(complete))
    assert result.images == 0
    assert result.id == redistill_cache.open_archive(complete).id
    assert {path: path.stat().st_mtime_ns for path in complete.rglob("*") if path.is_file()} == before


def test_adding_views_or_a_teacher_changes_no_existing_shard(tmp_path: Path):
    path = tmp_path / "a.zarr"
    first = cache_teacher(five_class_options(path, views=1))
    extended = cache_teacher(five_class_options(path, extend_views=True))
    assert extended.images == 90
    shards = {p: p.read_bytes() for p in path.rglob("c.*")}
    tiny = {"teacher": "demo:tiny?num_classes=5&weights=random"}
    with pytest.raises(Refused, match=r"holds the teacher small.*--teacher-name tiny.*--out"):
        cache_teacher(five_class_options(path, **tiny))
    tiny["teacher_name"] = "tiny"
    second = cache_teacher(five_class_options(path, **tiny))
    assert {p: p.read_bytes() for p in shards} == shards
    assert len({first.id, extended.id, second.id}) == 3
    assert set(redistill_cache.open_archive(path).teachers) == {"small", "tiny"}
    # One teacher alone may extend; the other follows, or not.
    third = cache_teacher(five_class_options(path, views=3, extend_views=True))
    archive = redistill_cache.open_archive(path)
    assert (archive.id, archive.num_views) == (third.id, 3)
    assert (archive.views_of("small"), archive.views_of("tiny")) == (3, 2)
    with pytest.raises(Refused, match=r"teacher 'tiny' was started with num_views = 2, now it is 3.*--extend-views"):
        cache_teacher(five_class_options(path, views=3, **tiny))
    cache_teacher(five_class_options(path, views=3, extend_views=True, **tiny))
    assert redistill_cache.open_archive(path).views_of("tiny") == 3
    assert verify(path, full=True).ok


def test_a_teacher_is_added_with_fewer_views(tmp_path: Path):
    path = tmp_path / "a.zarr"
    cache_teacher(five_class_options(path, views=3))
    tiny = {"teacher": "demo:tiny?num_classes=5&weights=random", "teacher_name": "b"}
    with pytest.raises(Refused, match=r"num_views = 3, now it is 4.*--extend-views"):
        cache_teacher(five_class_options(path, views=4, **tiny))
    added = cache_teacher(five_class_options(path, views=2, **tiny))
    archive = redistill_cache.open_archive(path)
    assert (archive.id, archive.num_views, archive.views_of("b")) == (added.id, 3, 2)
    assert (added.images, cache_teacher(five_class_options(path, views=2, **tiny)).images) == (180, 0)
    assert verify(path, full=True).ok


def test_an_interrupted_extension_is_readable_and_its_old_command_still_works(tmp_path: Path):
    path = tmp_path / "a.zarr"
    first = cache_teacher(five_class_options(path, views=1))
    with pytest.raises(Interrupted):
        cache_teacher(five_class_options(path, views=3, extend_views=True), SignalAtBatch(signal.SIGTERM, 4))
    assert redistill_cache.open_archive(path, verify="full").id == first.id
    assert verify(path, full=True).ok
    assert cache_teacher(five_class_options(path, views=1)).images == 0
    cache_teacher(five_class_options(path, views=3, extend_views=True))
    cache_teacher(five_class_options(tmp_path / "b.zarr", views=3))
    shards = {name: digest for name, digest in shard_hashes(path).items() if "/side/" not in name}
    assert shards.keys() <= shard_hashes(tmp_path / "b.zarr").keys()


def test_an_archive_keeps_its_recipe_when_none_is_given(tmp_path: Path):
    path = tmp_path / "a.zarr"
    cache_teacher(five_class_options(path, recipe="rrc?size=28&scale=0.5,1&aa=rand-m5-n2", size=None))
    other = {"teacher": "demo:tiny?num_classes=5&weights=random", "teacher_name": "b"}
    with pytest.raises(Refused) as error:
        cache_teacher(five_class_options(path, recipe="cifar?size=28", size=None, **other))
    assert "--recipe 'rrc?size=28&scale=0.5,1.0&aa=rand-m5-n2', now it is 'cifar?size=28'" in str(error.value)
    assert cache_teacher(five_class_options(path, recipe=None, size=None, **other)).id


def test_a_second_teacher_interrupted_on_a_sealed_archive_resumes(tmp_path: Path):
    path = tmp_path / "a.zarr"
    first = cache_teacher(five_class_options(path))
    other = {"teacher": "demo:tiny?num_classes=5&weights=random", "teacher_name": "tiny"}
    with pytest.raises(Interrupted):
        cache_teacher(five_class_options(path, **other), SignalAtBatch(signal.SIGTERM, 4))
    assert redistill_cache.open_archive(path).id == first.id, "the sealed archive stays readable"
    assert cache_teacher(five_class_options(path, **other)).id not in (None, first.id)


SLOW = [pytest.param(nth, marks=pytest.mark.slow) for nth in (3, 20, 60, 75, 105, 120)]


@pytest.mark.parametrize("nth", [40, 90, *SLOW])
def test_a_full_disk_stops_the_run_which_then_resumes(
    complete: Path, ram: Path, monkeypatch: pytest.MonkeyPatch, nth: int
):
    """From the nth file operation on, every write fails."""
    path, disk = ram / "a.zarr", FailingDisk(nth, Failure(errno.ENOSPC, persistent=True))
    with monkeypatch.context() as patched:
        for make in (ArchiveWriter.create, ArchiveWriter.resume):
            patched.setitem(make.__func__.__kwdefaults__, "files", disk)  # type: ignore[attr-defined]
        with pytest.raises(Refused, match="No space left on device; free some space") as error:
            cache_teacher(cache_options(path))
    assert "\n" not in str(error.value)
    assert disk.failed
    cache_teacher(cache_options(path))
    assert file_hashes(path) == file_hashes(complete)


def test_any_share_finishes_the_work_of_others(complete: Path, ram: Path):
    """The first of three dies after one batch, the second never starts: the last computes the rest, and seals."""
    path = ram / "a.zarr"
    with pytest.raises(Interrupted):
        cache_teacher(cache_options(path, share="0/3"), SignalAtBatch(signal.SIGTERM))
    result = cache_teacher(cache_options(path, share="2/3"))
    assert (result.id, result.images) == (redistill_cache.open_archive(path).id, 122)
    assert file_hashes(path) == file_hashes(complete)


def test_no_leader_is_needed(complete: Path, ram: Path):
    """A process that is not the first creates the archive; without help, the last one to finish its share seals."""
    path = ram / "a.zarr"
    second = cache_teacher(cache_options(path, share="1/2", no_help=True))
    assert (second.id, second.images) == (None, 58)
    assert "teachers/large" in second.missing
    with pytest.raises(Incomplete):
        redistill_cache.open_archive(path)
    first = cache_teacher(cache_options(path, share="0/2", no_help=True))
    assert (first.id, first.images, first.missing) == (redistill_cache.open_archive(path).id, 64, ())
    assert file_hashes(path) == file_hashes(complete)


def test_options_left_out_keep_their_stored_values(ram: Path):
    """Licence, citation and block size need not be repeated."""
    path = ram / "a.zarr"
    first = cache_teacher(cache_options(path, licence="CC-BY-4.0", citation="us"))
    assert cache_teacher(cache_options(path, block_rows=None)).id == first.id
    assert redistill_cache.open_archive(path).spec.licence == "CC-BY-4.0"


def test_adding_views_resumes(ram: Path):
    path = ram / "a.zarr"
    first = cache_teacher(cache_options(path, views=1))
    before = shard_hashes(path)
    with pytest.raises(Interrupted):
        cache_teacher(cache_options(path, extend_views=True), SignalAtBatch(signal.SIGINT, 6))
    second = cache_teacher(cache_options(path, extend_views=True))
    assert second.images in (29, 61), "a block committed before the interruption is not repeated"
    assert before.items() <= shard_hashes(path).items()
    assert first.id != second.id
    assert verify(path, full=True).ok
    with pytest.raises(Refused, match=r"no teacher 'newcomer'.*its teachers: large"):
        cache_teacher(cache_options(path, views=3, teacher_name="newcomer", extend_views=True))
    with pytest.raises(Refused, match="cannot shrink"):
        cache_teacher(cache_options(path, views=1, extend_views=True))
    assert redistill_cache.open_archive(path).id == second.id
    assert cache_teacher(cache_options(path, teacher=OTHER_TEACHER, teacher_name="other")).id != second.id


def shard_hashes(path: Path) -> dict[str, str]:
    return {name: digest for name, digest in file_hashes(path).items() if Path(name).name.startswith("c.")}


def test_a_damaged_archive_is_not_resumed(tmp_path: Path):
    path = tmp_path / "a.zarr"
    with pytest.raises(Interrupted):
        cache_teacher(cache_options(path), SignalAtBatch(signal.SIGTERM))
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"seed":0', '"seed": 0'))
    with pytest.raises(Damaged, match=r"zarr\.json"):
        cache_teacher(cache_options(path))


def test_two_labs_on_two_disks_give_the_archive_of_one_run(complete_five_classes: Path, ram: Path):
    """The second lab starts from a skeleton of the first one's archive."""
    first, second = (five_class_options(ram / lab, share=f"{i}/2", no_help=True) for i, lab in enumerate("ab"))
    assert cache_teacher(first).missing == ("teachers/small",)
    skeleton(ram / "a", ram / "b")
    assert cache_teacher(second).missing == ("teachers/small",)
    assert (
        merge(plan_merge([ram / "a", ram / "b"], ram / "c")) == redistill_cache.open_archive(complete_five_classes).id
    )
    assert file_hashes(ram / "c") == file_hashes(complete_five_classes)
