"""Removing a teacher, and editing the terms of a finished archive: at any moment it is the old archive or the new."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from redistill_cache import ArchiveWriter, open_archive
from redistill_cache.errors import Incomplete, OutOfRange, Refused, UsageError
from redistill_cache.inspect import describe
from redistill_cache.journal import CLOSE, END, sha256
from redistill_cache.strict_json import canonical
from redistill_cache.verify import quarantine, verify

from tests.faults.no_links import NoLinks
from tests.faults.power_cut import PowerCut, PowerCutDisk
from tests.tiny_archive import SPEC, contents, fill, make, start

NEW = {"licence": "CC0-1.0", "citation": "Somebody (2027)"}


@cache
def template(teachers: tuple[str, ...]) -> Path:
    path = Path(tempfile.mkdtemp()) / "a"
    make(path, replace(SPEC, num_views=2), teachers)
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    shutil.copytree(template(("a", "b")), tmp_path / "a")
    return tmp_path / "a"


# -- removing a teacher -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("removed", "kept"), [("b", "a"), ("a", "b")])
def test_a_removed_teacher_leaves_no_trace(two: Path, removed: str, kept: str):
    ArchiveWriter.resume(two).remove_teacher(removed)
    assert contents(two) == contents(template((kept,)))
    assert not (two / "teachers" / removed).exists()
    with pytest.raises(OutOfRange, match=f"no teacher '{removed}'; teachers: {kept}"):
        ArchiveWriter.resume(two).remove_teacher(removed)


def test_a_removal_killed_anywhere_is_finished_by_repeating_it(two: Path, tmp_path: Path):
    whole, kills = open_archive(two).id, 0
    for last in range(0, 400, 9):
        path = tmp_path / f"{last}"
        shutil.copytree(two, path)
        try:
            ArchiveWriter.resume(path, files=PowerCutDisk(tmp_path, cut_at=last)).remove_teacher("b")
        except PowerCut:
            kills += 1
        archive = open_archive(path, verify="full")
        assert ("b" in archive.teachers) == (archive.id == whole)
        assert verify(path, full=True).ok
        try:
            ArchiveWriter.resume(path).remove_teacher("b")
        except OutOfRange:
            assert not (path / "teachers/b").exists()
        assert contents(path) == contents(template(("a",)))
        shutil.rmtree(path)
    assert kills > 5


def test_an_unfinished_teacher_is_removed_from_an_unfinished_archive(tmp_path: Path):
    writer = start(tmp_path / "a", replace(SPEC, num_views=2), ("a", "b"))
    writer.remove_teacher("b")
    fill(writer)
    writer.seal()
    assert contents(tmp_path / "a") == contents(template(("a",)))


@pytest.mark.parametrize("name", ["c", "../a", "", "a/logits", "A"])
def test_only_a_teacher_is_removed(two: Path, name: str):
    before = contents(two)
    with pytest.raises(OutOfRange, match="has no teacher"):
        ArchiveWriter.resume(two).remove_teacher(name)
    assert contents(two) == before


# -- licence and citation ---------------------------------------------------------------------------------------------


def test_terms_are_edited_without_touching_a_block(two: Path):
    before, first = contents(two), open_archive(two).id
    identity = ArchiveWriter.resume(two).edit_terms(**NEW)
    archive = open_archive(two, verify="full")
    assert archive.id == identity != first
    assert {name: describe(archive)[name] for name in NEW} == NEW
    changed = {name for name, data in contents(two).items() if before[name] != data}
    assert changed == {"_redistill/manifest.json"}
    assert verify(two, full=True).ok
    # One at a time keeps the other; adding views and teachers, and removing one, keep both.
    ArchiveWriter.resume(two).edit_terms(citation="")
    assert (open_archive(two).spec.licence, open_archive(two).spec.citation) == ("CC0-1.0", "")
    writer = ArchiveWriter.extend_views(two, 3)
    fill(writer)
    writer.seal()
    ArchiveWriter.resume(two).remove_teacher("b")
    assert (open_archive(two).spec.licence, open_archive(two).num_views) == ("CC0-1.0", 3)
    ArchiveWriter.resume(two).edit_terms(licence=SPEC.licence, citation=SPEC.citation)
    make(two.parent / "b", SPEC, ("a",))
    assert contents(two) == contents(two.parent / "b"), "the terms of the specification need no other manifest"


def test_edited_terms_survive_a_quarantine(two: Path):
    identity = ArchiveWriter.resume(two).edit_terms(**NEW)
    shard = two / "teachers/a/logits/values/c.1.1.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert quarantine(two, verify(two, full=True).damaged) == ["teachers/a view 1 block 1"]
    writer = ArchiveWriter.resume(two)
    fill(writer)
    assert writer.seal() == identity
    assert open_archive(two, verify="full").spec.licence == NEW["licence"]


def test_an_edit_killed_anywhere_leaves_old_or_new(two: Path, tmp_path: Path):
    old = open_archive(two).id
    for last in range(0, 200, 7):
        path = tmp_path / f"{last}"
        shutil.copytree(two, path)
        with contextlib.suppress(PowerCut):
            ArchiveWriter.resume(path, files=PowerCutDisk(tmp_path, cut_at=last)).edit_terms(**NEW)
        archive = open_archive(path, verify="full")
        assert (archive.id == old) == (archive.spec.licence == SPEC.licence)
        shutil.rmtree(path)


def versions(path: Path) -> tuple[str, str]:
    """Of the specification and of the manifest."""
    root = json.loads((path / "zarr.json").read_bytes())["attributes"]["redistill"]
    return root["version"], json.loads((path / "_redistill/manifest.json").read_bytes())["manifest"]["version"]


def test_licences_of_others_and_the_source_of_images_need_a_newer_version_where_they_are_stated(two: Path):
    added = {"data_source": "Glyphs", "data_licence": "LicenseRef-Glyphs", "teacher_licence": "MIT"}
    path = two.parent / "b"
    make(path, replace(SPEC, **added), ("a", "b"))
    assert (versions(two), versions(path)) == (("1.0", "1.0"), ("1.1", "1.0"))
    assert {name: describe(open_archive(path, verify="full"))[name] for name in added} == added
    ArchiveWriter.resume(two).edit_terms(data_licence="MIT")
    assert versions(two) == ("1.0", "1.2")
    spec = open_archive(two, verify="full").spec
    assert (spec.licence, spec.data_licence, spec.teacher_licence) == (SPEC.licence, "MIT", "")
    # The manifest replaces all terms: those that it does not state are withdrawn.
    ArchiveWriter.resume(path).edit_terms(teacher_licence="", data_source="")
    assert open_archive(path).spec.added_terms == {"data_licence": "LicenseRef-Glyphs"}
    ArchiveWriter.resume(path).edit_terms(data_licence="")
    assert (open_archive(path).spec.added_terms, versions(path)) == ({}, ("1.1", "1.1"))


@pytest.mark.parametrize(
    ("version", "added", "message"),
    [
        ("1.1", {"data_licence": "MIT"}, "unknown field 'data_licence'"),
        ("1.2", {"data_licence": 3}, "'data_licence' must be a string"),
        ("1.2", {"data_licence": "x" * 5000}, "at most 4096"),
        ("1.2", {"price": "x"}, "unknown field 'price'"),
        ("1.3", {"price": "x"}, None),
    ],
)
def test_terms_of_a_manifest_are_those_of_its_version(two: Path, version: str, added: dict, message: str | None):
    path = two / "_redistill/manifest.json"
    ArchiveWriter.resume(two).edit_terms(**NEW)
    body = path.read_bytes().replace(b'"version":"1.1"', f'"version":"{version}"'.encode())
    body = body.replace(b'"terms":{', b'"terms":{' + canonical(added)[1:-1] + b",").partition(CLOSE)[0]
    path.write_bytes(body + CLOSE + sha256(body).encode() + END)
    with pytest.raises(Refused, match=message) if message else contextlib.nullcontext():
        assert open_archive(two).spec.licence == NEW["licence"]


def test_terms_that_cannot_be_edited(two: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="licence"):
        ArchiveWriter.resume(two).edit_terms(licence="x" * 5000)
    start(tmp_path / "b")
    with pytest.raises(Incomplete, match="not finished"):
        ArchiveWriter.resume(tmp_path / "b").edit_terms(**NEW)


# -- file systems without hard links ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_file_system_without_hard_links_and_exclusive_renames_is_named(two: Path, tmp_path: Path, code: int):
    ArchiveWriter.create(tmp_path / "new", SPEC, files=NoLinks(code))
    ArchiveWriter.resume(two, files=NoLinks(code))
    for attempt in (
        lambda files: ArchiveWriter.create(tmp_path / "other", SPEC, files=files),
        lambda files: ArchiveWriter.resume(two, files=files),
    ):
        with pytest.raises(Refused, match=r"file system of .* neither hard links.*choose an --out") as error:
            attempt(NoLinks(code, renames=False))
        assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.partial"))
    assert verify(two, full=True).ok
