"""Writing: creating, resuming, extending and sealing an archive, and the input that is refused."""

from __future__ import annotations

import errno
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redistill_cache import ArchiveWriter, ArraySpec, SignalSpec, TeacherSpec, open_archive
from redistill_cache.codecs import fit_codec
from redistill_cache.codecs.catalogue import WITHOUT_SIDE_DATA
from redistill_cache.errors import Damaged, Incomplete, NewerFormat, OutOfRange, Refused, SpecMismatch, UsageError
from redistill_cache.layout import Block
from redistill_cache.spec import ADDED_TERMS, CODECS, ArchiveSpec
from redistill_cache.spec_files import read_root
from redistill_cache.storage import Files
from redistill_cache.strict_json import canonical

from tests.tiny_archive import SPEC, TEACHER, block_data, contents, fill, make, samples, start


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# -- opening ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(archive_copy: Path) -> Path:
    return archive_copy


def test_create_refuses_an_existing_path(archive: Path, tmp_path: Path):
    for path in (archive, archive / "zarr.json"):
        with pytest.raises(Refused, match="exists already"):
            ArchiveWriter.create(path, SPEC)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(Refused, match="exists already"):
        ArchiveWriter.create(tmp_path / "link", SPEC)


def test_create_accepts_an_empty_or_a_missing_folder(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    ArchiveWriter.create(tmp_path / "empty", SPEC)
    ArchiveWriter.create(tmp_path / "a/b/c", SPEC)
    assert (tmp_path / "a/b/c/zarr.json").is_file()


CHANGED: dict[str, object] = {
    "num_samples": 51,
    "num_classes": 7,
    "class_names": ("ant", "bee", "cat", "dog", "eel", "fox"),
    "block_rows": 8,
    "recipe": {"version": 1, "ops": [{"op": "crop", "size": 33}]},
    "seed": 8,
    "view_arrays": (*SPEC.view_arrays[:1], replace(SPEC.view_arrays[1], dtype="int8")),
    "canaries_per_view": 3,
    "source": {"description": "other"},
    "excluded": (),
    "licence": "CC0-1.0",
    "citation": "",
    **dict.fromkeys(ADDED_TERMS, "stated now"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_resume_names_the_field_that_differs(tmp_path: Path, name: str):
    ArchiveWriter.create(tmp_path / "a", SPEC)
    changes: dict[str, Any] = {name: CHANGED[name]}
    if name == "num_classes":
        changes["class_names"] = tuple("abcdefg")
    other = replace(SPEC, **changes)
    with pytest.raises(SpecMismatch) as error:
        ArchiveWriter.resume(tmp_path / "a", other)
    # If several fields differ, only the first by name is named.
    assert name in one_line(error) or (name == "num_classes" and "class_names" in one_line(error))


def test_every_field_of_a_specification_is_compared_or_may_differ():
    free = {"num_views", "environment"}
    assert {*CHANGED, *free, "format", "version"} == set(replace(SPEC, **dict.fromkeys(ADDED_TERMS, "x")).to_json())


def test_resume_accepts_another_environment_and_keeps_the_first(tmp_path: Path):
    ArchiveWriter.create(tmp_path / "a", SPEC)
    writer = ArchiveWriter.resume(tmp_path / "a", replace(SPEC, environment={"zarr": "4"}))
    assert writer.spec.environment == {"zarr": "3"}


def test_resume_never_writes_through_a_link(tmp_path: Path, archive: Path):
    (archive / "views").rename(tmp_path / "views")
    (archive / "views").symlink_to(tmp_path / "views")
    before = contents(tmp_path / "views")
    with pytest.raises(Refused, match="symbolic link"):
        ArchiveWriter.resume(archive)
    assert contents(tmp_path / "views") == before


def test_nothing_is_added_to_an_archive_of_a_newer_minor_version(tmp_path: Path):
    ArchiveWriter.create(tmp_path / "a", SPEC)
    value = SPEC.resolved().to_json() | {"version": "1.2", "added_later": 1}
    document = {"zarr_format": 3, "node_type": "group", "attributes": {"redistill": value}}
    (tmp_path / "a/zarr.json").write_bytes(canonical(document))
    assert read_root(tmp_path / "a").newer == "1.2"
    for attempt in (ArchiveWriter.resume, lambda path: ArchiveWriter.extend_views(path, 9)):
        with pytest.raises(NewerFormat, match="not added to"):
            attempt(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"data_licence": "MIT"}, Refused, "unknown field 'data_licence'"),
        ({"version": "1.1"}, Damaged, "not the canonical form"),
        ({"version": "1.1", "data_licence": ""}, Damaged, "not the canonical form"),
        ({"version": "1.1", "data_licence": 1}, Refused, "'data_licence' must be a string"),
        ({"version": "1.1", "data_licence": "x" * 5000}, Refused, "at most 4096"),
        ({"version": "1.1", "data_licence": "MIT", "price": "x"}, Refused, "unknown field 'price'"),
    ],
)
def test_terms_of_a_specification_are_those_of_its_version(tmp_path: Path, changes: dict, kind: type, message: str):
    ArchiveWriter.create(tmp_path / "a", SPEC)
    document = {"zarr_format": 3, "node_type": "group"}
    attributes = {"redistill": SPEC.resolved().to_json() | changes}
    (tmp_path / "a/zarr.json").write_bytes(canonical(document | {"attributes": attributes}))
    with pytest.raises(kind, match=message):
        read_root(tmp_path / "a")


# -- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_written_once(tmp_path: Path):
    writer = start(tmp_path / "a")
    writer.write_samples(**samples())
    other = samples() | {"labels": np.zeros(50, np.int64)}
    with pytest.raises(SpecMismatch, match="label"):
        writer.write_samples(**other)


BAD_SAMPLES: dict[str, tuple[Mapping[str, object], str]] = {
    "duplicate keys": ({"keys": ["a"] * 50}, "two samples have the key 'a'"),
    "no key": ({"keys": ["", *(str(i) for i in range(49))]}, "1 to 4096 bytes"),
    "a key of 5000 bytes": ({"keys": ["x" * 5000, *(str(i) for i in range(49))]}, "1 to 4096 bytes"),
    "too few keys": ({"keys": ["a", "b"]}, "key_offsets"),
    "labels that are not integers": ({"labels": np.zeros(50)}, "label"),
    "labels of a missing class": ({"labels": np.full(50, 6)}, "from 0 to 5"),
    "labels below none": ({"labels": np.full(50, -2)}, "from 0 to 5"),
    "digests of 16 bytes": ({"digests": np.zeros((50, 16), np.uint8)}, "digest"),
    "sizes of one dimension": ({"sizes": np.zeros(50, np.uint32)}, "size"),
}


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_invalid_samples_are_refused_before_anything_is_written(tmp_path: Path, case: str):
    changes, message = BAD_SAMPLES[case]
    writer = ArchiveWriter.create(tmp_path / "a", SPEC)
    before = contents(tmp_path / "a")
    with pytest.raises(UsageError, match=message) as error:
        writer.write_samples(**samples() | changes)
    one_line(error)
    assert contents(tmp_path / "a") == before


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_missing_blocks_are_listed_view_by_view(tmp_path: Path):
    writer = start(tmp_path / "a")
    blocks = writer.missing("teachers/tiny")
    assert [(block.view, block.index) for block in blocks] == [(v, i) for v in range(3) for i in range(4)]
    assert [list(block.rows) for block in blocks[:4]] == [list(range(i, min(i + 16, 50))) for i in range(0, 50, 16)]
    writer.write(blocks[5], *block_data(blocks[5]))
    assert writer.missing("teachers/tiny") == [*blocks[:5], *blocks[6:]]
    assert len(writer.missing("canaries")) == 3
    with pytest.raises(UsageError, match="teachers/tiny"):
        writer.missing("teachers/other")


def test_a_block_written_twice_keeps_its_first_data(tmp_path: Path):
    writer = start(tmp_path / "a")
    block = writer.missing("views")[0]
    arrays, stats = block_data(block)
    assert not writer.is_committed(block)
    record = writer.write(block, arrays, stats)
    assert record is not None
    assert writer.is_committed(block)
    before = contents(tmp_path / "a")
    assert {path: entry.size for path, entry in record.files.items()} == {
        path: len(before[path]) for path in record.files
    }
    assert set(record.files) == {"views/crop/c.0.0.0", "views/flip/c.0.0"}
    assert writer.write(block, {name: array * 0 for name, array in arrays.items()}) is None
    assert contents(tmp_path / "a") == before


def test_invalid_blocks_are_refused(tmp_path: Path):
    writer = start(tmp_path / "a")
    block = writer.missing("views")[0]
    good, _ = block_data(block)
    cases: list[tuple[Block, dict[str, np.ndarray], type[Exception], str]] = [
        (block, {"crop": good["crop"]}, UsageError, r"arrays missing: \['flip'\]"),
        (block, good | {"spin": good["flip"]}, UsageError, "spin"),
        (block, good | {"flip": good["flip"].astype(np.int64)}, UsageError, "must be uint8"),
        (block, good | {"flip": good["flip"][:-1]}, UsageError, r"\[16\], found uint8 \[15\]"),
        (replace(block, view=3), good, OutOfRange, "3 views"),
        (replace(block, view=-1), good, OutOfRange, "3 views"),
        (replace(block, index=4), good, OutOfRange, "4 blocks"),
        (replace(block, stop=15), good, UsageError, "missing()"),
        (replace(block, part="teachers/x"), good, UsageError, "no part"),
    ]
    before = contents(tmp_path / "a")
    for wrong, arrays, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            writer.write(wrong, arrays)
        one_line(error)
    assert contents(tmp_path / "a") == before


def test_stats_that_a_reader_would_refuse_are_refused(tmp_path: Path):
    writer = start(tmp_path / "a")
    block = writer.missing("teachers/tiny")[0]
    arrays, _ = block_data(block)
    deep: dict[str, Any] = {}
    for _ in range(50):
        deep = {"a": deep}
    for stats in (deep, {"a": "x" * 2_000_000}, {"a": [[]] * 300_000}):
        with pytest.raises(UsageError, match="stats"):
            writer.write(block, arrays, stats)
    assert writer.missing("teachers/tiny")[0] == block


# -- sealing ----------------------------------------------------------------------------------------------------------


def test_an_incomplete_archive_is_not_sealed(tmp_path: Path):
    writer = ArchiveWriter.create(tmp_path / "a", SPEC)
    with pytest.raises(Incomplete, match="the first is samples"):
        writer.seal()
    writer.write_samples(**samples())
    writer.add_teacher(TEACHER)
    fill(writer, ["views", "canaries"])
    with pytest.raises(
        Incomplete, match="12 of 29 blocks are missing, the first is teachers/tiny view 0 block 0"
    ) as error:
        writer.seal()
    one_line(error)
    assert not writer.sealed


opened_records: Counter[str] | None = None


def count_record(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and opened_records is not None and "_redistill/blocks/" in str(args[0]):
        opened_records[Path(args[0]).name] += 1


@cache
def watch_opened_files() -> None:  # for good: an audit hook cannot be removed
    sys.addaudithook(count_record)


@pytest.fixture
def opened() -> Iterator[Counter[str]]:
    """How often this process has opened each commit record."""
    global opened_records
    watch_opened_files()
    opened_records = Counter()
    yield opened_records
    opened_records = None


def test_a_writer_reads_each_record_once(tmp_path: Path, opened: Counter[str]):
    path = tmp_path / "a"
    fill(start(path), parts=("views", "canaries"))
    writer, other = ArchiveWriter.resume(path), ArchiveWriter.resume(path)
    opened.clear()
    writer.read_back()
    assert not opened, "they were read when it resumed"
    fill(other)
    opened.clear()
    for _ in range(3):
        writer.read_back()
    assert set(opened) == {file.name for file in path.rglob("teachers.tiny.[0-9]*.json")}, "those of the other writer"
    assert set(opened.values()) == {1}
    opened.clear()
    writer.seal()
    assert not opened


def test_a_record_that_changes_is_read_again(tmp_path: Path):
    path = tmp_path / "a"
    writer = start(path)
    fill(writer)
    identity = writer.seal()
    record = path / "_redistill/blocks/views.0.0.json"
    data = record.read_bytes()
    record.write_bytes(data.replace(b'"view":0', b'"view":1'))
    with pytest.raises(Damaged, match="commit record of"):
        writer.seal()
    record.write_bytes(data)
    assert writer.seal() == identity
    record.unlink()
    record.symlink_to(path / "zarr.json")
    with pytest.raises(Refused, match="symbolic link"):
        writer.seal()


def test_a_prefix_of_views_is_sealed_and_then_continued(tmp_path: Path):
    path = tmp_path / "a"
    writer = start(path)
    for part in writer.parts():
        for block in writer.missing(part):
            if block.view < 2:
                writer.write(block, *block_data(block))
    for wrong in (0, 4, -1):
        with pytest.raises(OutOfRange):
            writer.seal(views=wrong)
    first = writer.seal(views=2)
    archive = open_archive(path)
    assert (archive.id, archive.num_views, archive.complete) == (first, 2, True)
    with pytest.raises(OutOfRange, match="views 0 to 1"):
        archive.logits(2)
    again = ArchiveWriter.resume(path, SPEC)
    fill(again)
    whole = again.seal()
    assert whole != first
    assert whole == make(tmp_path / "b")
    assert contents(path) == contents(tmp_path / "b")


def test_a_teacher_added_later_changes_no_file_and_gives_a_new_id(archive: Path, tmp_path: Path):
    before, old = contents(archive), open_archive(archive).id
    writer = ArchiveWriter.resume(archive, SPEC)
    writer.add_teacher(replace(TEACHER, name="second"))
    assert open_archive(archive).id == old, "the teacher is not part of the archive before the next seal"
    fill(writer)
    new = writer.seal()
    after = contents(archive)
    manifest = "_redistill/manifest.json"
    assert {name: data for name, data in before.items() if name != manifest}.items() <= after.items()
    assert new != old
    assert set(open_archive(archive).teachers) == {"tiny", "second"}
    assert new == make(tmp_path / "b", teachers=("second", "tiny")), (
        "the order in which teachers were added does not matter"
    )


def test_a_teacher_cannot_change(tmp_path: Path):
    writer = start(tmp_path / "a")
    writer.add_teacher(TEACHER)
    with pytest.raises(SpecMismatch, match=r"model\.weights"):
        writer.add_teacher(replace(TEACHER, model={"name": "demo:tiny", "weights": "1" * 64}))
    wide = SignalSpec("logits", "float32", 7, {"metric": "kl"}, (ArraySpec("values", "float32", (7,)),))
    with pytest.raises(UsageError, match="number of classes"):
        writer.add_teacher(TeacherSpec("wide", (wide,)))
    assert not (tmp_path / "a/teachers/wide").exists()


def test_views_are_added_without_touching_blocks(archive: Path, tmp_path: Path):
    before = contents(archive)
    with pytest.raises(Refused, match="cannot shrink"):
        ArchiveWriter.extend_views(archive, 2)
    writer = ArchiveWriter.extend_views(archive, 4)
    fill(writer)
    writer.seal()
    unchanged = {name: data for name, data in before.items() if "/c." in name or "/blocks/" in name}
    assert unchanged.items() <= contents(archive).items()
    make(tmp_path / "b", replace(SPEC, num_views=4))
    assert contents(archive) == contents(tmp_path / "b")


def test_notes_do_not_change_the_id(archive: Path):
    identity = open_archive(archive).id
    writer = ArchiveWriter.resume(archive, SPEC)
    writer.note("run-1", {"seconds": 3.5})
    assert writer.seal() == identity
    with pytest.raises(UsageError, match="short name"):
        writer.note("../run", {})


# -- errors of the disk -----------------------------------------------------------------------------------------------


class BrokenDisk(Files):
    """A disk that cannot be written."""

    def __init__(self, number: int) -> None:
        self._number = number

    def write(self, path: Path, data: bytes | memoryview) -> None:  # noqa: ARG002
        raise OSError(self._number, os.strerror(self._number), str(path))


ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EROFS: "choose a path that can be written",
    errno.EIO: "check the disk",
}


@pytest.mark.parametrize("number", ADVICE)
def test_errors_of_the_disk_give_advice(tmp_path: Path, number: int):
    with pytest.raises(Refused, match=f"cannot create .*{os.strerror(number)}; {ADVICE[number]}") as error:
        ArchiveWriter.create(tmp_path / "a", SPEC, files=BrokenDisk(number))
    one_line(error)
    start(tmp_path / "b")
    writer = ArchiveWriter.resume(tmp_path / "b", files=BrokenDisk(number))
    block = writer.missing("views")[0]
    with pytest.raises(Refused, match="then run the same command again: committed blocks are kept") as error:
        writer.write(block, *block_data(block))
    one_line(error)


# -- specifications ---------------------------------------------------------------------------------------------------

BAD_SPECS: dict[str, tuple[Mapping[str, Any], str]] = {
    "no samples": ({"num_samples": 0}, "num_samples"),
    "true samples": ({"num_samples": True}, "num_samples"),
    "names of another number of classes": ({"class_names": ("a",)}, "one per class"),
    "a name with half a surrogate pair": ({"class_names": ("\ud800", *"bcdef")}, "class name"),
    "not a number": ({"recipe": {"scale": float("nan")}}, "finite"),
    "code in a recipe": ({"recipe": {"op": print}}, "plain JSON"),
    "numbers for keys": ({"source": {1: 2}}, "plain JSON"),
    "a long recipe": ({"recipe": {"note": "x" * 70_000}}, "at most 65536 bytes"),
    "an array of objects": ({"view_arrays": (ArraySpec("a", "object"),)}, "dtype"),
    "two arrays of one name": ({"view_arrays": (ArraySpec("a", "uint8"),) * 2}, "duplicates"),
    "an array outside of the archive": ({"view_arrays": (ArraySpec("../a", "uint8"),)}, "a-z"),
    "an array in capitals": ({"view_arrays": (ArraySpec("Crop", "uint8"),)}, "a-z"),
    "parameters as large as an image": ({"view_arrays": (ArraySpec("a", "uint8", (224, 224)),)}, "4096 bytes per view"),
    "more canaries than samples": ({"canaries_per_view": 51}, "canaries_per_view"),
    "an excluded sample without a reason": ({"excluded": ({"key": "a"},)}, "a key and a reason"),
}


@pytest.mark.parametrize("case", BAD_SPECS)
def test_invalid_specifications_are_refused(case: str):
    changes, message = BAD_SPECS[case]
    with pytest.raises(UsageError, match=message) as error:
        replace(SPEC, **changes)
    one_line(error)


def test_every_codec_of_the_format_is_implemented():
    assert {"linear", *WITHOUT_SIDE_DATA} == set(CODECS)


def test_too_many_files_or_chunks_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="choose more rows per block"):
        ArchiveWriter.create(tmp_path / "a", replace(SPEC, num_samples=10**6, num_views=100))
    huge = ArchiveSpec(num_samples=2**24, num_views=1, num_classes=2, block_rows=2**24)
    with pytest.raises(UsageError, match="choose fewer rows"):
        replace(huge, view_arrays=(ArraySpec("a", "uint8", chunk_rows=16),)).resolved()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("value", [np.nan, -np.inf, 3e38])
def test_rows_that_no_reader_accepts_are_not_written(tmp_path: Path, value: float):
    writer = ArchiveWriter.create(tmp_path / "a.redistill.zarr", SPEC)
    writer.add_teacher(TEACHER, {})
    block = writer.missing("teachers/tiny")[0]
    arrays, stats = block_data(block)
    arrays["layer4.1/values"] = arrays["layer4.1/values"].copy()
    arrays["layer4.1/values"][5, 1] = value
    with pytest.raises(UsageError, match=r"row 5 of array 'layer4.1/values' holds NaN, Inf or a value above 2\^100"):
        writer.write(block, arrays, stats)


def test_statistics_that_cannot_be_of_the_block_are_not_written(tmp_path: Path):
    writer = start(tmp_path / "a")
    block = writer.missing("teachers/tiny")[0]
    arrays, stats = block_data(block)
    assert stats is not None
    with pytest.raises(UsageError, match=r"stats.* are not of 15 rows"):
        writer.write(block, arrays, stats | {"logits": stats["logits"] | {"rows": 15, "exact_rows": 0, "top1_kept": 0}})


def test_side_data_that_a_reader_would_refuse_are_not_written(tmp_path: Path):
    codec = fit_codec("linear", np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32))
    side = codec.side()
    side["offset"] = np.full_like(side["offset"], 1e31)
    writer = ArchiveWriter.create(tmp_path / "a.redistill.zarr", SPEC)
    with pytest.raises(UsageError, match=r"teacher 'net', signal 'logits': .* of at most 2\^100"):
        writer.add_teacher(TeacherSpec("net", (SignalSpec.of("logits", codec),)), {"logits": side})
    assert not (tmp_path / "a.redistill.zarr/teachers/net").exists()
