"""The same archive to the byte: on a disk that fills up, with ranks that come and go, with what was not said again."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import redistill_cache
from redistill_cache import ArchiveWriter
from redistill_cache.errors import Damaged, Incomplete, Refused
from redistill_cache.verify import verify

from redistill.caching import cache_teacher
from redistill.interrupts import Interrupted
from redistill.progress import NoProgress
from redistill.ranks import Rank
from tests.faults.failing_disk import FailingDisk, Failure
from tests.stage1 import OTHER_TEACHER, asked, files_of


class Stopped(NoProgress):
    """Sends a signal to its own process when batches are answered for the nth time."""

    def __init__(self, number: int, nth: int = 1) -> None:
        self.number, self.left = number, nth

    def advance(self, task: str, *_: object, **__: object) -> None:
        self.left -= task == "teacher"
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "a.zarr"
    cache_teacher(asked(path))
    return path


SLOW = [pytest.param(nth, marks=pytest.mark.slow) for nth in (3, 20, 60, 75, 105, 120)]


@pytest.mark.parametrize("nth", [40, 90, *SLOW])
def test_a_disk_that_fills_up_stops_the_run_and_costs_nothing_else(
    whole: Path, ram: Path, monkeypatch: pytest.MonkeyPatch, nth: int
):
    """From its nth operation on, nothing can be written any more."""
    path, disk = ram / "a.zarr", FailingDisk(nth, Failure(errno.ENOSPC, persistent=True))
    with monkeypatch.context() as patched:
        for make in (ArchiveWriter.create, ArchiveWriter.resume):
            patched.setitem(make.__func__.__kwdefaults__, "files", disk)  # type: ignore[attr-defined]
        with pytest.raises(Refused, match="No space left on device; free some space") as error:
            cache_teacher(asked(path))
    assert "\n" not in str(error.value)
    assert disk.failed
    cache_teacher(asked(path))
    assert files_of(path) == files_of(whole)


def test_whoever_is_there_does_the_work(whole: Path, ram: Path, monkeypatch: pytest.MonkeyPatch):
    """The first rank dies when it has begun, the last of three does everything, and a lone one finishes."""
    path = ram / "a.zarr"
    with pytest.raises(Interrupted):
        cache_teacher(asked(path), Stopped(signal.SIGTERM))
    with monkeypatch.context() as last:
        last.setenv("RANK", "2")
        last.setenv("WORLD_SIZE", "3")
        result = cache_teacher(asked(path))
    assert (result.id, result.images) == (None, 122)
    with pytest.raises(Incomplete):
        redistill_cache.open_archive(path)
    assert cache_teacher(asked(path)).images == 0
    assert files_of(path) == files_of(whole)


def test_every_block_has_an_owner_and_helpers():
    ranks = [Rank(rank, 3, rank, 3).work_order(range(11)) for rank in range(3)]
    assert [sorted(order) for order in ranks] == [list(range(11))] * 3
    assert [order[:3] for order in ranks] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert len({order[-1] for order in ranks}) == 3, "helpers do not all help with the same block"


def test_what_was_not_said_is_as_it_was(ram: Path):
    """A licence, a citation and the size of blocks need not be repeated."""
    path = ram / "a.zarr"
    first = cache_teacher(asked(path, licence="CC-BY-4.0", citation="us"))
    assert cache_teacher(asked(path, block_rows=None)).id == first.id
    assert redistill_cache.open_archive(path).spec.licence == "CC-BY-4.0"


def test_adding_views_is_continued_too(ram: Path):
    path = ram / "a.zarr"
    first = cache_teacher(asked(path, views=1))
    there = shards(path)
    with pytest.raises(Interrupted):
        cache_teacher(asked(path, extend_views=True), Stopped(signal.SIGINT, 6))
    second = cache_teacher(asked(path, extend_views=True))
    assert second.images in (29, 61), "a block that was committed before the interruption is not done again"
    assert there.items() <= shards(path).items()
    assert first.id != second.id
    assert verify(path, full=True).ok
    with pytest.raises(Refused, match=r"no teacher 'newcomer'.*its teachers: large"):
        cache_teacher(asked(path, views=3, teacher_name="newcomer", extend_views=True))
    with pytest.raises(Refused, match="cannot shrink"):
        cache_teacher(asked(path, views=1, extend_views=True))
    assert redistill_cache.open_archive(path).id == second.id
    assert cache_teacher(asked(path, teacher=OTHER_TEACHER)).id != second.id


def shards(path: Path) -> dict[str, str]:
    return {name: digest for name, digest in files_of(path).items() if Path(name).name.startswith("c.")}


def test_a_damaged_archive_is_not_continued(tmp_path: Path):
    path = tmp_path / "a.zarr"
    with pytest.raises(Interrupted):
        cache_teacher(asked(path), Stopped(signal.SIGTERM))
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"seed":0', '"seed": 0'))
    with pytest.raises(Damaged, match=r"zarr\.json"):
        cache_teacher(asked(path))
