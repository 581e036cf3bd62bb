"""Skeleton and merge: two labs on two disks write one archive; archives that do not fit together are refused."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import fetch_archive, open_archive
from redistill_cache.combining import merge, plan_merge, skeleton
from redistill_cache.errors import Damaged, RedistillError, Refused, SpecMismatch, UsageError
from redistill_cache.packing import pack
from redistill_cache.spec import ArchiveSpec
from redistill_cache.verify import verify
from redistill_cache.writer import ArchiveWriter

from tests import tiny_archive
from tests.cache.test_archive_additions import add
from tests.conftest import folder_in_memory
from tests.tiny_archive import TEACHER, block_data, contents, fill, logits, samples

# Two views of three blocks, the last one short.
SPEC = replace(tiny_archive.SPEC, num_samples=20, num_views=2, block_rows=8)


def start(path: Path, spec: ArchiveSpec = SPEC, teachers: tuple[str, ...] = ("tiny",)) -> ArchiveWriter:
    return tiny_archive.start(path, spec, teachers)


def make(path: Path, spec: ArchiveSpec = SPEC, teachers: tuple[str, ...] = ("tiny",)) -> str:
    return tiny_archive.make(path, spec, teachers)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with folder_in_memory(tmp_path_factory.mktemp("sealed")) as folder:
        make(folder / "a.redistill.zarr")
        yield folder / "a.redistill.zarr"


@pytest.fixture
def tmp_path(ram: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In memory, with an empty cache folder: these tests write many small files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(ram / "cache"))
    return ram


def joined(*archives: Path, out: Path) -> str | None:
    return merge(plan_merge(archives, out))


def fill_share(writer: ArchiveWriter, index: int, count: int) -> None:
    """As cache-teacher --share INDEX/COUNT --no-help: a share of the teacher's blocks, and all that teachers share."""
    fill(writer, ["views", "canaries"])
    for block in writer.missing("teachers/tiny")[index::count]:
        writer.write(block, *block_data(block, writer.spec))


# -- skeleton, and the shares of one archive --------------------------------------------------------------------------


def test_a_skeleton_is_the_archive_before_its_first_block(sealed: Path, tmp_path: Path):
    fresh = start(tmp_path / "fresh")
    for source in (sealed, fresh.path):
        skeleton(source, tmp_path / "made" / source.name)
        assert contents(tmp_path / "made" / source.name) == contents(fresh.path)
    writer = ArchiveWriter.resume(tmp_path / "made" / sealed.name, SPEC)
    assert len(writer.missing("teachers/tiny")) == 6
    fill(writer)
    assert writer.seal() == open_archive(sealed).id


def test_a_skeleton_is_made_once_and_never_over_anything_else(sealed: Path, tmp_path: Path):
    skeleton(sealed, tmp_path / "s")
    begun = ArchiveWriter.resume(tmp_path / "s")
    fill_share(begun, 0, 2)
    before = contents(tmp_path / "s")
    skeleton(sealed, tmp_path / "s")
    assert contents(tmp_path / "s") == before
    make(tmp_path / "other", replace(SPEC, seed=8))
    with pytest.raises(SpecMismatch, match=r"seed is 7 in \S+, 8 in \S+other"):
        skeleton(sealed, tmp_path / "other")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").touch()
    with pytest.raises(Refused, match="holds files and is not an archive"):
        skeleton(sealed, tmp_path / "folder")


@pytest.mark.parametrize("count", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_labs_on_separate_disks_give_the_bytes_of_one_run(sealed: Path, tmp_path: Path, count: int):
    first = start(tmp_path / "lab0")
    writers = [first]
    for index in range(1, count):
        skeleton(first.path, tmp_path / f"lab{index}")
        writers.append(ArchiveWriter.resume(tmp_path / f"lab{index}", SPEC))
    for index, writer in enumerate(writers):
        fill_share(writer, index, count)
    plan = plan_merge([writer.path for writer in writers], tmp_path / "one")
    assert (plan.missing, plan.blocks) == (0, 2 + 2 + 6 + 6)
    assert not (tmp_path / "one").exists()
    assert merge(plan) == open_archive(sealed).id
    assert contents(tmp_path / "one") == contents(sealed)
    again = plan_merge([writer.path for writer in writers], tmp_path / "one")
    assert (again.bytes_to_copy, merge(again)) == (0, open_archive(sealed).id)
    assert contents(tmp_path / "one") == contents(sealed)


def test_an_unfinished_merge_says_what_is_missing_and_is_finished_later(sealed: Path, tmp_path: Path):
    first = start(tmp_path / "a")
    skeleton(first.path, tmp_path / "b")
    second = ArchiveWriter.resume(tmp_path / "b", SPEC)
    fill_share(first, 0, 3)
    fill_share(second, 1, 3)
    plan = plan_merge([first.path, second.path], tmp_path / "c")
    assert (plan.missing, str(plan.first_missing)) == (2, "teachers/tiny view 0 block 2")
    assert merge(plan) is None
    report = verify(tmp_path / "c", full=True)
    assert (report.damaged, report.missing_blocks) == ((), 2)
    fill_share(second, 0, 1)
    assert joined(first.path, second.path, out=tmp_path / "c") == open_archive(sealed).id
    assert contents(tmp_path / "c") == contents(sealed)


def test_the_writer_continues_an_unfinished_merge(sealed: Path, tmp_path: Path):
    first = start(tmp_path / "a")
    fill_share(first, 0, 2)
    skeleton(first.path, tmp_path / "b")
    assert joined(first.path, tmp_path / "b", out=tmp_path / "c") is None
    writer = ArchiveWriter.resume(tmp_path / "c", SPEC)
    fill(writer)
    assert writer.seal(complete=True) == open_archive(sealed).id


# -- teachers and views -----------------------------------------------------------------------------------------------


def test_teachers_of_two_archives_are_joined_with_what_was_added_to_them(tmp_path: Path):
    """The labs wrote their archives on their own, with other versions of libraries."""
    make(tmp_path / "expected", SPEC, ("other", "tiny"))
    expected = add(tmp_path / "expected")
    make(tmp_path / "a", SPEC, ("tiny",))
    add(tmp_path / "a")
    make(tmp_path / "b", replace(SPEC, environment={"zarr": "4"}), ("other",))
    assert joined(tmp_path / "a", tmp_path / "b", out=tmp_path / "c") == expected
    assert contents(tmp_path / "c") == contents(tmp_path / "expected")
    assert open_archive(tmp_path / "c").signals_of("tiny") == ("logits", "layer4.1", "layer3")


def test_a_teacher_with_fewer_views_is_complete(tmp_path: Path):
    make(tmp_path / "a", replace(SPEC, num_views=1))
    make(tmp_path / "b", SPEC, ("other",))
    identity = joined(tmp_path / "a", tmp_path / "b", out=tmp_path / "c")
    archive = open_archive(tmp_path / "c", verify="full")
    assert (archive.id, archive.num_views) == (identity, 2)
    assert (archive.views_of("tiny"), archive.views_of("other")) == (1, 2)
    for view in range(2):
        assert np.array_equal(archive.logits(view, teacher="other"), open_archive(tmp_path / "b").logits(view))
    assert joined(tmp_path / "c", tmp_path / "a", out=tmp_path / "again") == identity
    writer = ArchiveWriter.resume(tmp_path / "c")
    fill(writer)
    make(tmp_path / "both", SPEC, ("tiny", "other"))
    assert writer.seal() == open_archive(tmp_path / "both").id


def test_views_that_are_being_added_to_a_sealed_archive_are_joined(sealed: Path, tmp_path: Path):
    make(tmp_path / "a", replace(SPEC, num_views=1))
    first = ArchiveWriter.extend_views(tmp_path / "a", 2)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    second = ArchiveWriter.resume(tmp_path / "b")
    fill_share(first, 0, 2)
    plan = plan_merge([first.path, second.path], tmp_path / "c")
    assert (plan.missing, merge(plan)) == (1, None)
    fill_share(second, 0, 1)
    assert joined(first.path, second.path, out=tmp_path / "d") == open_archive(sealed).id
    assert open_archive(tmp_path / "a").num_views == 1


def test_terms_that_were_edited_are_kept(sealed: Path, tmp_path: Path):
    shutil.copytree(sealed, tmp_path / "a")
    edited = ArchiveWriter.resume(tmp_path / "a").edit_terms(licence="CC0-1.0")
    skeleton(tmp_path / "a", tmp_path / "b")
    assert joined(tmp_path / "b", tmp_path / "a", out=tmp_path / "c") == edited
    writer = ArchiveWriter.resume(tmp_path / "b")
    fill(writer)
    assert writer.seal() == edited
    with pytest.raises(SpecMismatch, match=r"licence is 'CC0-1.0' in \S+, 'CC-BY-4.0' in"):
        plan_merge([tmp_path / "a", sealed], tmp_path / "d")
    half = start(tmp_path / "half")
    fill_share(half, 0, 2)
    assert joined(half.path, tmp_path / "a", out=tmp_path / "e") == edited


# -- archives that do not fit together --------------------------------------------------------------------------------


def other_samples(name: str, row: int, value: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        writer, changed = ArchiveWriter.create(path, SPEC), samples(SPEC)
        changed[name][row] = value
        writer.write_samples(**changed)

    return write


def other_spec(**changed: object) -> Callable[[Path], None]:
    spec: ArchiveSpec = replace(SPEC, **changed)
    return lambda path: start(path, spec)


def other_teacher(path: Path) -> None:
    writer = start(path, SPEC, ())
    writer.add_teacher(replace(TEACHER, model=TEACHER.model | {"weights": "1" * 64}))


def other_block(path: Path) -> None:
    writer = start(path)
    block = writer.missing("teachers/tiny")[4]
    arrays, stats = block_data(block)
    arrays["logits/values"] = arrays["logits/values"][::-1]
    writer.write(block, arrays, stats)


def other_statistics(path: Path) -> None:
    writer = start(path)
    block = writer.missing("teachers/tiny")[4]
    arrays, _ = block_data(block)
    writer.write(block, arrays, None)


UNLIKE: dict[str, tuple[Callable[[Path], None], str]] = {
    "samples": (other_spec(num_samples=19), "num_samples is 20 in {}, 19 in {}"),
    "recipe": (
        other_spec(recipe={"version": 1, "ops": [{"op": "crop", "size": 31}]}),
        "recipe.ops[0].size is 32 in {}",
    ),
    "seed": (other_spec(seed=8), "seed is 7 in {}, 8 in {}"),
    "source": (other_spec(source={"description": "real"}), "source.description is 'synthetic' in {}, 'real' in {}"),
    "class": (
        other_spec(class_names=("ant", "bee", "cat", "cow", "eel", "fóx")),
        "class_names[3] is 'dog' in {}, 'cow'",
    ),
    "block rows": (other_spec(block_rows=16), "block_rows is 8 in {}, 16 in {}"),
    "excluded": (other_spec(excluded=()), "excluded is [{'key': 'bad.png', 'reason': 'truncated'}] in {}, [] in {}"),
    "licence": (other_spec(licence=""), "licence is 'CC-BY-4.0' in {}, '' in {}"),
    "key": (other_samples("keys", 7, "x.png"), "the key of sample 7 is 'class/00007.png' in {}, 'x.png' in {}"),
    "label": (other_samples("labels", 3, -1), f"sample 3 ('class/00003.png') is {samples(SPEC)['labels'][3]} in "),
    "size": (other_samples("sizes", 0, 9), "the size of sample 0 ('class/00000.png') is ["),
    "digest": (other_samples("digests", 19, 0), f", {'00' * 32} in "),
    "teacher": (other_teacher, "teacher tiny: model.weights is '000"),
    "block": (other_block, "teachers/tiny view 1 block 1 has other bytes in teachers/tiny/logits/values/c.1.1.0 in "),
    "statistics": (other_statistics, "teachers/tiny view 1 block 1 has other statistics in "),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_unlike_archives_are_refused_with_the_field_and_both_values(sealed: Path, tmp_path: Path, case: str):
    write, message = UNLIKE[case]
    write(tmp_path / "b")
    before = contents(tmp_path / "b")
    with pytest.raises(SpecMismatch) as refused:
        plan_merge([sealed, tmp_path / "b"], tmp_path / "c")
    pattern = re.escape(message).replace(r"\{\}", r"\S+")
    assert re.search(pattern, str(refused.value)), str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "c").exists()
    assert contents(tmp_path / "b") == before


def test_two_later_archives_are_compared_with_each_other(tmp_path: Path):
    start(tmp_path / "a", SPEC, ())
    start(tmp_path / "b")
    other_teacher(tmp_path / "c")
    with pytest.raises(SpecMismatch, match=r"teacher tiny: model\.weights"):
        plan_merge([tmp_path / "a", tmp_path / "b", tmp_path / "c"], tmp_path / "out")


def test_what_cannot_be_merged_is_refused_before_anything_is_written(sealed: Path, tmp_path: Path):
    pack(sealed, tmp_path / "packed")
    copy = fetch_archive(str(tmp_path / "packed"), tmp_path / "copy", views=1)
    make(tmp_path / "other", replace(SPEC, seed=8))
    cases: list[tuple[list[Path], Path, type[RedistillError], str]] = [
        ([sealed, copy], tmp_path / "c", Refused, "holds a part of its archive only"),
        ([sealed], tmp_path / "c", UsageError, "at least two archives"),
        ([sealed, sealed], sealed, UsageError, "is one of the archives"),
        ([sealed, sealed], tmp_path / "other", SpecMismatch, "seed is 7 in"),
        ([sealed, tmp_path / "none"], tmp_path / "c", Refused, "does not exist"),
    ]
    for archives, out, kind, message in cases:
        with pytest.raises(kind, match=message):
            plan_merge(archives, out)
    assert not (tmp_path / "c").exists()


def test_a_full_disk_is_refused_before_anything_is_written(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = plan_merge([sealed, sealed], tmp_path / "c")
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=plan.bytes_to_copy - 1))
    with pytest.raises(Refused, match=f"needs {plan.bytes_to_copy} bytes, {plan.bytes_to_copy - 1} are free"):
        merge(plan)
    assert not (tmp_path / "c").exists()


def test_damage_of_an_archive_is_not_copied(sealed: Path, tmp_path: Path):
    archive_copy = tmp_path / "a"
    shutil.copytree(sealed, archive_copy)
    shard = archive_copy / "teachers/tiny/logits/values/c.1.1.0"
    good = shard.read_bytes()
    shard.write_bytes(good[:-1])
    with pytest.raises(Damaged, match="teachers/tiny view 1 block 1 are missing or cut short"):
        plan_merge([archive_copy, archive_copy], tmp_path / "c")
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(Damaged, match=r"c.1.1.0 does not have the SHA-256"):
        joined(archive_copy, archive_copy, out=tmp_path / "c")
    shard.write_bytes(good)
    assert joined(archive_copy, archive_copy, out=tmp_path / "c") == open_archive(archive_copy).id
    assert np.array_equal(open_archive(tmp_path / "c").logits(1), open_archive(archive_copy).logits(1))
    assert np.allclose(open_archive(tmp_path / "c").logits(1), logits(1, SPEC), atol=1e-2)


def test_blocks_of_a_writer_that_died_are_left_out_and_not_touched(tmp_path: Path):
    fill(start(tmp_path / "a"))
    shard = tmp_path / "a/teachers/tiny/logits/values/c.1.1.0"
    staged = shard.with_name(f"{shard.name}.{hashlib.sha256(shard.read_bytes()).hexdigest()}.partial")
    shard.rename(staged)
    plan = plan_merge([tmp_path / "a", tmp_path / "a"], tmp_path / "c")
    assert (plan.missing, str(plan.first_missing)) == (1, "teachers/tiny view 1 block 1")
    assert merge(plan) is None
    assert staged.exists()
    assert not shard.exists()


MERGE_AND_MEASURE = """
import resource, sys
from pathlib import Path
from redistill_cache.combining import merge, plan_merge
assert merge(plan_merge([Path(sys.argv[1]), Path(sys.argv[2])], Path(sys.argv[3])))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_depend_on_the_size_of_the_archives(tmp_path: Path):
    def peak(views: int) -> int:
        folder = tmp_path / str(views)
        spec = replace(tiny_archive.SPEC, num_samples=8192, num_views=views, block_rows=2048)
        first = start(folder / "a", spec)
        skeleton(first.path, folder / "b")
        fill(first, ["views", "canaries"])
        for index, writer in enumerate((first, ArchiveWriter.resume(folder / "b"))):
            for block in writer.missing("teachers/tiny")[index::2]:
                writer.write(block, *block_data(block, spec))
        command = [sys.executable, "-c", MERGE_AND_MEASURE, *(str(folder / name) for name in "abc")]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    small = peak(2)
    assert peak(40) < 1.15 * small
