"""The packed form, and copies with some views: made, fetched from servers and folders, and checked."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import ArchiveWriter, download, fetch_archive, open_archive, packed
from redistill_cache.errors import Damaged, OutOfRange, Refused
from redistill_cache.inspect import describe, describe_at
from redistill_cache.layout import all_blocks, view_of_file
from redistill_cache.packing import pack
from redistill_cache.verify import quarantine, verify

from tests import tiny_archive
from tests.tiny_archive import SPEC, contents, stored_logits

Serve = Callable[..., tuple[str, list[str]]]
VIEWS = 3


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def packed_copy(sealed: Path, tmp_path: Path) -> Path:
    pack(sealed, tmp_path / "shared" / "a.redistill")
    return tmp_path / "shared" / "a.redistill"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def assert_is(copy: Path, sealed: Path) -> None:
    """The same files, all of them right."""
    assert contents(copy) == contents(sealed)
    assert verify(copy, full=True).ok
    assert open_archive(copy).complete


# -- the form ---------------------------------------------------------------------------------------------------------


def test_the_packed_form_is_a_few_tars_that_tar_can_read(sealed: Path, packed_copy: Path, tmp_path: Path):
    names = ["base.tar", "manifest.json", *(f"view-{view:04d}.tar" for view in range(VIEWS))]
    assert sorted(files_of(packed_copy)) == names
    assert (packed_copy / "manifest.json").read_bytes() == (sealed / "_redistill/manifest.json").read_bytes()
    (tmp_path / "tree").mkdir()
    for tar in packed_copy.glob("*.tar"):
        subprocess.run(["tar", "-xf", tar, "-C", tmp_path / "tree"], check=True, timeout=60)
        with tarfile.open(tar) as opened:
            members = opened.getmembers()
        assert [member.name for member in members] == sorted(member.name for member in members)
        assert {(m.mode, m.uid, m.gid, m.mtime, m.uname, m.gname) for m in members} == {(0o644, 0, 0, 0, "", "")}
    manifest = {"_redistill/manifest.json": (packed_copy / "manifest.json").read_bytes()}
    assert contents(tmp_path / "tree") | manifest == contents(sealed)


def test_its_bytes_follow_from_the_archive(packed_copy: Path, tmp_path: Path, sealed: Path):
    """And are those that FORMAT.md states: hashes of a tar written by hand after it."""
    shutil.copytree(sealed, tmp_path / "b")
    for path in (tmp_path / "b").rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    pack(tmp_path / "b", tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(packed_copy)
    expected = hashlib.sha256()
    files = [name for name in contents(sealed) if view_of_file(name) == 1]
    for name in sorted(files):
        data = (sealed / name).read_bytes()
        head = bytearray(512)
        for at, text in (
            (0, name),
            (100, "0000644\0"),
            (108, "0000000\0"),
            (116, "0000000\0"),
            (124, f"{len(data):011o}\0"),
            (136, "00000000000\0"),
            (148, " " * 8),
            (156, "0"),
            (257, "ustar\00000"),
        ):
            head[at : at + len(text)] = text.encode()
        head[148:156] = f"{sum(head):06o}\0 ".encode()
        expected.update(bytes(head) + data + bytes(-len(data) % 512))
    expected.update(bytes(1024))
    assert hashlib.sha256((packed_copy / "view-0001.tar").read_bytes()).digest() == expected.digest()


@pytest.mark.parametrize(
    ("name", "size"),
    [("a", 0), ("a" * 100, 8**11 - 1), ("a" * 101, 5), ("a/" * 200 + "b", 5), ("a", 8**11), ("a" * 300, 10**13)],
)
def test_the_size_of_a_header_is_known_before_it_is_made(name: str, size: int):
    head = packed.header(name, size)
    assert len(head) == packed.header_bytes(name, size)
    read = tarfile.TarInfo.frombuf(head[-512:], "ascii", "strict")  # checks the checksum
    assert (read.name, read.size) == (name[:100], size if size < 8**11 else 0)
    with tarfile.open(fileobj=io.BytesIO(head + bytes(1024))) as tar:
        first = tar.firstmember
        assert (first.name, first.size) == (name, size)


def test_the_view_of_a_file_is_known_from_its_path(sealed: Path):
    state = open_archive(sealed).state
    expected: dict[str, int | None] = dict.fromkeys(state.files)
    for block, names in all_blocks(state.spec, state.teachers, state.num_views):
        if block.part != "samples" and not block.part.endswith("/side"):
            expected |= dict.fromkeys([block.record_path, *names], block.view)
    assert {name: view_of_file(name) for name in state.files} == expected
    assert set(expected.values()) == {None, 0, 1, 2}
    for name in ("teachers/a/side/side/x/c.1.0", "teachers/side/logits/side/x/c.1.0", "samples/digest/c.1.0"):
        assert view_of_file(name) is None
    assert view_of_file("_redistill/blocks/teachers.a.side.0.0.json") is None
    assert view_of_file("_redistill/blocks/teachers.side.1.2.json") == 1
    assert view_of_file("teachers/a/side/q/c.7.0.0") == 7


def test_many_views_share_tars(tmp_path: Path):
    tiny_archive.make(tmp_path / "a", replace(SPEC, num_views=200, canaries_per_view=0, view_arrays=()), ())
    files = [f"teachers/a/logits/q/c.{view}.0.0" for view in range(200)]
    tars = packed.contents([*files, "zarr.json"], 200)
    assert len(tars) == 1 + 67
    assert tars["view-0003.tar"] == sorted(files[3:6])
    assert tars["base.tar"] == ["zarr.json"]


def test_packing_continues_and_refuses_another_archive(sealed: Path, packed_copy: Path, tmp_path: Path):
    before = files_of(packed_copy)
    (packed_copy / "manifest.json").unlink()
    (packed_copy / "view-0001.tar").write_bytes(before["view-0001.tar"][:-512])  # not by this command
    (packed_copy / "view-0002.tar").unlink()
    (packed_copy / f"view-0002.tar.{'0' * 32}.partial").write_bytes(b"killed")
    kept = (packed_copy / "base.tar").stat()
    pack(sealed, packed_copy)
    assert files_of(packed_copy) == before
    assert (packed_copy / "base.tar").stat().st_ino == kept.st_ino
    tiny_archive.make(tmp_path / "b", replace(SPEC, num_views=1))
    with pytest.raises(Refused, match=r"holds view-0001\.tar of another archive; choose another folder"):
        pack(tmp_path / "b", packed_copy)
    assert files_of(packed_copy) == before


def test_a_damaged_or_unfinished_archive_is_not_packed(archive_copy: Path, tmp_path: Path):
    shard = archive_copy / "views/crop/c.1.0.0.0"
    if not shard.exists():
        shard = next((archive_copy / "views/crop").glob("c.1.*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Damaged, match=r"views/crop/c\.1.* does not have the SHA-256 that was committed"):
        pack(archive_copy, tmp_path / "p")
    assert not (tmp_path / "p" / "manifest.json").exists()
    (archive_copy / "_redistill/manifest.json").unlink()
    with pytest.raises(Refused, match="not finished"):
        pack(archive_copy, tmp_path / "p")


# -- fetched ----------------------------------------------------------------------------------------------------------


def test_the_packed_form_is_opened_like_the_archive(sealed: Path, packed_copy: Path, serve: Serve):
    address, requests = serve(packed_copy.parent)
    identity = open_archive(sealed).id
    for location in (str(packed_copy), f"{packed_copy}#sha256={identity}", f"{address}/a.redistill"):
        archive = open_archive(location)
        assert (archive.id, archive.path.name) == (identity, "a.redistill.zarr")
        assert_is(archive.path, sealed)
        shutil.rmtree(archive.path.parent)
    description = describe_at(str(packed_copy))
    assert description | {"path": ""} == describe(open_archive(sealed)) | {"path": ""}
    assert len(requests) < 2 * len(files_of(packed_copy))
    with pytest.raises(Refused, match=f"expected the archive with id {'f' * 64}, found {identity}"):
        open_archive(f"{packed_copy}#sha256={'f' * 64}")


@pytest.mark.parametrize("form", ["tree", "packed", "tree on a server", "packed on a server"])
def test_views_are_fetched_by_and_by(form: str, sealed: Path, packed_copy: Path, serve: Serve, tmp_path: Path):
    source = sealed if form.startswith("tree") else packed_copy
    address, requests = serve(source.parent)
    location = f"{address}/{source.name}" if form.endswith("server") else str(source)
    out = tmp_path / "out"
    for views, held in ((1, 1), (2, 2), (1, 2)):
        assert fetch_archive(location, out, views=views) == out
        archive = open_archive(out, verify="full")
        assert archive.id == open_archive(sealed).id
        assert (archive.num_views, archive.views_of(), archive.complete) == (held, held, False)
        for view in range(held):
            assert np.array_equal(archive.logits(view), stored_logits(view))
            archive.canaries(view)
            archive.view_params(view)
        for read in (archive.logits, archive.view_params, archive.canaries, archive.load_view):
            with pytest.raises(OutOfRange, match=f"views 0 to {held - 1}"):
                read(held)
        report = verify(out, full=True)
        assert (report.ok, report.views, report.sealed_views) == (True, held, VIEWS)
        here = describe(archive)
        assert (here["num_views"], here["sealed_views"], here["complete"]) == (held, VIEWS, False)
    assert not [request for request in requests if "c.2." in request or "view-0002" in request]
    assert fetch_archive(location, out) == out
    assert_is(out, sealed)
    with pytest.raises(OutOfRange, match=f"has {VIEWS} views, 4 are asked for"):
        fetch_archive(location, out, views=4)


def test_a_partial_copy_is_never_taken_for_the_whole(sealed: Path, tmp_path: Path, packed_copy: Path):
    out = tmp_path / "out"
    fetch_archive(str(packed_copy), out, views=1)
    before = contents(out)
    for change in (
        lambda: ArchiveWriter.resume(out),
        lambda: ArchiveWriter.extend_views(out, 5),
        lambda: pack(out, tmp_path / "p"),
        lambda: quarantine(out, ()),
    ):
        with pytest.raises(Refused, match="is a copy that holds a part of its archive only"):
            change()
    assert contents(out) == before
    (out / "_redistill/copy.json").unlink()
    with pytest.raises(Damaged, match="is missing"):
        open_archive(out)
    for flaw in (b"", b"{}", b'{"id":"x","views":1}', b'{"id":"%s","views":4}' % str(open_archive(sealed).id).encode()):
        (out / "_redistill/copy.json").write_bytes(flaw)
        with pytest.raises(Refused) as refused:
            open_archive(out)
        assert "\n" not in str(refused.value)


def test_a_copy_that_was_interrupted_is_not_an_archive(packed_copy: Path, tmp_path: Path, sealed: Path):
    out = fetch_archive(str(packed_copy), tmp_path / "out", views=2)
    (out / "_redistill/manifest.json").unlink()
    for partial in (False, True):
        with pytest.raises(Refused, match="was not fetched completely; run 'redistill archive fetch' to it again"):
            open_archive(out, allow_partial=partial)
    with pytest.raises(Refused, match="a part of its archive only"):
        ArchiveWriter.resume(out)
    assert fetch_archive(str(packed_copy), out, views=1) == out
    assert open_archive(out).num_views == 2, "what was here is not lost"
    assert_is(fetch_archive(str(packed_copy), out), sealed)


def test_the_copy_in_the_cache_may_hold_some_views(sealed: Path, packed_copy: Path, serve: Serve):
    address, requests = serve(packed_copy.parent)
    location = f"{address}/a.redistill"
    copy = fetch_archive(location, views=1)
    assert open_archive(copy).num_views == 1
    before = len(requests)
    assert open_archive(location).path == copy  # all views
    assert_is(copy, sealed)
    assert not [request for request in requests[before:] if "view-0000" in request]


def test_teachers_with_fewer_views_have_as_many_in_a_copy(tmp_path: Path):
    path = tmp_path / "a"
    writer = tiny_archive.start(path, SPEC, ("a", "b"))
    for part in writer.parts():
        for block in writer.missing(part):
            if part != "teachers/b" or block.view < 1:
                writer.write(block, *tiny_archive.block_data(block))
    writer.seal(complete=True)
    pack(path, tmp_path / "p")
    for views, of_b in ((1, 1), (2, 1)):
        archive = open_archive(fetch_archive(str(tmp_path / "p"), tmp_path / "out", views=views))
        assert (archive.views_of("a"), archive.views_of("b")) == (views, of_b)
        assert verify(archive.path, full=True).ok


def test_a_folder_with_something_else_is_left_alone(sealed: Path, packed_copy: Path, tmp_path: Path):
    out = tmp_path / "out"
    (out / "redistill-documents-0" / "documents").mkdir(parents=True)  # of a killed fetch
    (out / "_redistill").mkdir()
    (out / "_redistill" / f"copy.json.{'0' * 32}.partial").write_text("")
    fetch_archive(str(packed_copy), out)
    assert_is(out, sealed)
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(Refused, match="holds other files"):
        fetch_archive(str(packed_copy), out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]
    other = tmp_path / "other"
    tiny_archive.make(other, teachers=())
    before = contents(other)
    with pytest.raises(Refused, match=f"holds the archive with id {open_archive(other).id}"):
        fetch_archive(str(packed_copy), other)
    assert contents(other) == before


def test_a_damaged_copy_is_repaired_by_fetching_again(sealed: Path, packed_copy: Path, tmp_path: Path):
    out = fetch_archive(str(packed_copy), tmp_path / "out")
    shard = next((out / "views/crop").glob("c.1.*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(shard, (1, 1))  # the clock of the file system may not have moved since it was fetched
    fetch_archive(str(packed_copy), out)
    assert_is(out, sealed)


# -- hostile ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base.tar", "view-0001.tar"])
@pytest.mark.parametrize("change", ["name", "link", "size", "content", "short", "empty", "order", "missing"])
def test_a_tar_that_is_not_the_one_of_its_manifest_is_refused(
    packed_copy: Path, serve: Serve, tmp_path: Path, name: str, change: str, monkeypatch: pytest.MonkeyPatch
):
    tar = packed_copy / name
    data = bytearray(tar.read_bytes())
    if change == "name":
        data[0:5] = b"../ev"
    elif change == "link":
        data[156] = ord("2")
    elif change == "size":
        data[134] ^= 1
    elif change == "content":
        data[600] ^= 1
    elif change == "order":
        data[0:1024], data[1024:2048] = data[1024:2048], data[0:1024]
    tar.write_bytes(bytes(data) if change not in ("short", "empty") else bytes(data[: 600 if change == "short" else 0]))
    if change == "missing":
        tar.unlink()
    address, _ = serve(packed_copy.parent)
    monkeypatch.setattr(download, "PATIENCE_S", 0.0)
    for location in (str(packed_copy), f"{address}/a.redistill"):
        with pytest.raises((Damaged, Refused), match=rf"a\.redistill/{name.partition('.')[0]}\.tar") as refused:
            fetch_archive(location, tmp_path / "out")
        assert "\n" not in str(refused.value)
        with pytest.raises(Refused):
            open_archive(tmp_path / "out")
    assert not list(tmp_path.rglob("*.partial"))
    assert {path.name for path in tmp_path.iterdir()} <= {"shared", "out", "cache"}
