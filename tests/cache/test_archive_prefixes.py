"""An archive whose views or teachers are being added stays what it was, and a teacher may have fewer views than it."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import Archive, ArchiveWriter, open_archive
from redistill_cache.errors import Damaged, Incomplete, OutOfRange, Refused
from redistill_cache.inspect import describe
from redistill_cache.verify import verify

from tests.attacks.forge import reseal
from tests.faults.power_cut import PowerCut, PowerCutDisk
from tests.tiny_archive import SPEC, TEACHER, block_data, contents, make, stored_logits


@functools.cache
def template(views: int, teachers: tuple[str, ...]) -> Path:
    path = Path(tempfile.mkdtemp()) / "a"
    make(path, replace(SPEC, num_views=views), teachers)
    return path


def sealed(path: Path, views: int = 2, teachers: tuple[str, ...] = ("a",)) -> Path:
    shutil.copytree(template(views, teachers), path)
    return path


def write(writer: ArchiveWriter, parts: Iterable[str], views: int) -> None:
    for part in parts:
        for block in writer.missing(part):
            if block.view < views:
                writer.write(block, *block_data(block, writer.spec))


def assert_holds(archive: Archive, views: int, teachers: dict[str, int]) -> None:
    assert (archive.num_views, dict.fromkeys(teachers, 0)) == (views, dict.fromkeys(archive.teachers, 0))
    assert archive.spec.num_views >= views
    for name, count in teachers.items():
        assert archive.views_of(name) == count
        for view in range(count):
            assert np.array_equal(archive.logits(view, teacher=name), stored_logits(view, SPEC, name))
        with pytest.raises(OutOfRange, match=f"views 0 to {count - 1}"):
            archive.logits(count, teacher=name)
    for view in range(views):
        assert set(archive.view_params(view)) == {"crop", "flip"}
        archive.canaries(view)


@pytest.mark.parametrize("more", [3, 12])
def test_readers_keep_the_sealed_archive_while_views_are_added(tmp_path: Path, more: int):
    """12 has another length than 2 in every zarr.json."""
    path = sealed(tmp_path / "a")
    identity = open_archive(path).id
    writer = ArchiveWriter.extend_views(path, more)
    for views in range(2, 4):
        write(writer, writer.parts(), views)
        archive = open_archive(path, verify="full")
        assert (archive.id, archive.spec.num_views) == (identity, 2)
        assert_holds(archive, 2, {"a": 2})
        assert verify(path, full=True).ok
    write(writer, writer.parts(), more)
    assert writer.seal() != identity
    assert contents(path) == contents(sealed(tmp_path / "b", more))


@pytest.mark.parametrize(
    "first", [*range(0, 30, 5), *(pytest.param(n, marks=pytest.mark.slow) for n in range(30) if n % 5)]
)
def test_an_extension_killed_anywhere_leaves_the_sealed_archive(tmp_path: Path, first: int):
    path = sealed(tmp_path / "a")
    identity = open_archive(path).id
    with contextlib.suppress(PowerCut):
        ArchiveWriter.extend_views(path, 4, files=PowerCutDisk(tmp_path, cut_at=first))
    assert open_archive(path).id == identity
    assert_holds(open_archive(path, verify="full"), 2, {"a": 2})
    assert verify(path, full=True).ok
    write(ArchiveWriter.extend_views(path, 4), ("views", "canaries", "teachers/a"), 4)
    ArchiveWriter.resume(path).seal()
    assert contents(path) == contents(sealed(tmp_path / "b", 4))


def test_a_prefix_can_be_extended_and_stays_open(tmp_path: Path):
    """Sealed with three views when four were declared, then more are declared."""
    path = sealed(tmp_path / "a", 2)
    writer = ArchiveWriter.extend_views(path, 4)
    write(writer, writer.parts(), 3)
    identity = writer.seal(complete=True)
    assert_holds(open_archive(path), 3, {"a": 3})
    ArchiveWriter.extend_views(path, 7)
    assert open_archive(path).id == identity
    assert_holds(open_archive(path, verify="full"), 3, {"a": 3})


def test_other_changes_of_the_specification_are_damage(tmp_path: Path):
    path = sealed(tmp_path / "a")
    ArchiveWriter.extend_views(path, 4)
    file = path / "views/crop/zarr.json"
    file.write_bytes(file.read_bytes().replace(b"int32", b"int16"))
    with pytest.raises(Damaged, match=r"views/crop/zarr\.json"):
        open_archive(path)
    file = path / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b'"seed":7', b'"seed":8'))
    with pytest.raises(Damaged, match="different archives"):
        open_archive(path)


def test_every_teacher_is_complete_on_its_own(tmp_path: Path):
    """a is extended to four views without b; b is left at two, e at one, f without any."""
    path = sealed(tmp_path / "a", 2, ("a", "b"))
    writer = ArchiveWriter.extend_views(path, 4)
    write(writer, ("views", "canaries", "teachers/a"), 4)
    for name, views in (("e", 1), ("f", 0)):
        writer.add_teacher(replace(TEACHER, name=name))
        write(writer, (f"teachers/{name}",), views)
    block = writer.missing("teachers/f")[0]
    writer.write(block, *block_data(block, writer.spec))
    identity = writer.seal(complete=True)
    archive = open_archive(path, verify="full")
    assert archive.id == identity
    assert_holds(archive, 4, {"a": 4, "b": 2, "e": 1})
    assert verify(path, full=True).ok
    description = describe(archive)
    assert description["teacher_views"] == {"a": 4, "b": 2, "e": 1}
    sizes = [description["teachers"][name]["logits"]["bytes_per_view"] for name in "abe"]
    assert max(sizes) < 1.2 * min(sizes)
    # Finished later, it is the archive that was written at once.
    for name in "bef":
        write(ArchiveWriter.resume(path), (f"teachers/{name}",), 4)
    ArchiveWriter.resume(path).seal()
    assert contents(path) == contents(sealed(tmp_path / "b", 4, ("a", "b", "e", "f")))


def test_sealing_still_needs_a_teacher_with_all_views(tmp_path: Path):
    path = sealed(tmp_path / "a")
    writer = ArchiveWriter.extend_views(path, 3)
    write(writer, ("views", "canaries"), 3)
    with pytest.raises(Incomplete, match="teachers/a view 2"):
        writer.seal()


def test_a_seal_leaves_the_staged_files_of_another_teacher(tmp_path: Path):
    path = sealed(tmp_path / "a")
    writer = ArchiveWriter.resume(path)
    writer.add_teacher(replace(TEACHER, name="b"))
    staged = path / "teachers/b/logits/values" / f"c.0.0.0.{'0' * 64}.partial"
    dead = path / "teachers/a/logits/values" / f"c.0.0.0.{'0' * 64}.partial"
    for file in (staged, dead):
        file.write_bytes(b"rows")
    writer.seal(complete=True)
    assert staged.exists()
    assert not dead.exists()


def test_a_seal_offers_what_other_processes_declared(tmp_path: Path):
    path = sealed(tmp_path / "a")
    early = ArchiveWriter.resume(path)
    other = ArchiveWriter.extend_views(path, 3)
    other.add_teacher(replace(TEACHER, name="b"))
    write(other, other.parts(), 3)
    identity = other.seal()
    assert early.seal(complete=True) == identity
    assert contents(path) == contents(sealed(tmp_path / "b", 3, ("a", "b")))


@pytest.mark.parametrize("forged", [{"a": 1}, {"a": 0}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": True}])
def test_a_forged_number_of_views_is_refused(tmp_path: Path, forged: dict):
    path = sealed(tmp_path / "a")
    reseal(path, teacher_views=forged)
    with pytest.raises((Damaged, Refused)) as error:
        open_archive(path)
    assert "\n" not in str(error.value)
