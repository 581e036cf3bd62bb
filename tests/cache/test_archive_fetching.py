"""Archives at a URL: fetched once, verified, and refused when they differ from their manifest."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from redistill_cache import download, fetch_archive, open_archive
from redistill_cache.addresses import parse_address
from redistill_cache.errors import Damaged, Incomplete, Refused, UsageError
from redistill_cache.inspect import describe_at
from redistill_cache.verify import verify

from tests import tiny_archive
from tests.flaky_server import Flaky, Request, serving

Serve = Callable[..., tuple[str, list[str]]]
NAME = "tiny.redistill.zarr"
SHARD = "teachers/tiny/logits/exact/c.0.2.0"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that contains an archive."""
    (tmp_path / "shared").mkdir()
    tiny_archive.make(tmp_path / "shared" / NAME)
    return tmp_path / "shared"


def copies(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("manifest.json"))


def test_a_url_is_fetched_once_and_whole(shared: Path, serve: Serve, tmp_path: Path):
    address, requests = serve(shared)
    original, copy = open_archive(shared / NAME), open_archive(f"{address}/{NAME}/")
    assert copy.id == original.id
    assert copy.path.name == NAME
    np.testing.assert_array_equal(copy.logits(view=2, rows=[3, 49]), original.logits(view=2, rows=[3, 49]))
    assert verify(copy.path, full=True).ok
    before = len(requests)
    steps: list[tuple[int, int]] = []
    assert fetch_archive(f"{address}/{NAME}", progress=lambda *step: steps.append(step)) == copy.path
    documents = [f"/{NAME}/_redistill/{name}" for name in ("manifest.json", "manifest.json.sig")]
    assert requests[before:] == documents
    assert not steps


@pytest.mark.parametrize("target", [None, "/dev/zero"])
def test_a_lock_that_is_a_pipe_or_a_link_is_refused_without_waiting(
    shared: Path, serve: Serve, tmp_path: Path, target: str | None
):
    address, _ = serve(shared)
    shutil.rmtree(fetch_archive(f"{address}/{NAME}").parent)
    for lock in (tmp_path / "cache" / "redistill" / "locks").iterdir():
        lock.unlink()
        if target is None:
            os.mkfifo(lock)
        else:
            lock.symlink_to(target)
    with pytest.raises(Refused, match=r"locks/.* is not a regular file|Too many levels of symbolic links"):
        fetch_archive(f"{address}/{NAME}")


def test_an_interrupted_fetch_is_continued(shared: Path, serve: Serve, tmp_path: Path):
    address, requests = serve(shared)
    shard = shared / NAME / SHARD
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(Refused, match=r"cannot fetch.*404"):
        fetch_archive(f"{address}/{NAME}")
    assert not copies(tmp_path)
    assert not list((tmp_path / "cache").rglob("*.partial"))
    shard.write_bytes(data)
    before = len(requests)
    steps: list[tuple[int, int]] = []
    path = fetch_archive(f"{address}/{NAME}", progress=lambda *step: steps.append(step))
    assert verify(path, full=True).ok
    assert steps[-1][0] == steps[-1][1] == sum(size for _, size in sizes(path))
    assert len(requests) - before < len(list(sizes(path))), "files that are already fetched are not fetched again"


def test_a_closed_connection_is_retried(shared: Path, serve: Serve):
    shard = f"/{NAME}/{SHARD}"
    address, requests = serve(shared, fragile=[shard])
    assert verify(fetch_archive(f"{address}/{NAME}"), full=True).ok
    assert requests.count(shard) == 2


def test_a_connection_that_closes_every_time_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "WAIT_S", 0.05)

    def answer(number: int, _: Request) -> str:
        if number == 3:  # before, a slow machine may use up all of it
            monkeypatch.setattr(download, "PATIENCE_S", 0.5)
        return "short"

    with serving(Flaky({"a": bytes(1000)}, answer, etags=False)) as flaky:
        with pytest.raises(
            Refused, match=r"cannot fetch .*: the connection closed after 500 of 1000 bytes, \d attempts in \d+ s; "
        ):
            download.read_address(parse_address(f"{flaky.address}/a"), 1 << 20)
        assert len(flaky.requests) > 2


def sizes(path: Path) -> list[tuple[str, int]]:
    state = open_archive(path).state
    return [(name, entry.size) for name, entry in state.files.items()]


@pytest.mark.parametrize("change", ["other bytes", "longer", "shorter"])
def test_a_file_that_differs_from_the_manifest_is_damaged(shared: Path, serve: Serve, tmp_path: Path, change: str):
    address, _ = serve(shared)
    shard = shared / NAME / SHARD
    data = shard.read_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    shard.write_bytes({"other bytes": flipped, "longer": data + b"x", "shorter": data[:-1]}[change])
    with pytest.raises(Damaged, match=f"{SHARD}: size or SHA-256 differ from the manifest"):
        open_archive(f"{address}/{NAME}")
    assert not copies(tmp_path)


def test_a_replaced_archive_gets_its_own_copy(shared: Path, serve: Serve):
    address, _ = serve(shared)
    first = fetch_archive(f"{address}/{NAME}")
    shutil.rmtree(shared / NAME)
    tiny_archive.make(shared / NAME, teachers=())
    second = fetch_archive(f"{address}/{NAME}")
    assert first != second
    assert open_archive(first).id != open_archive(second).id


def test_an_address_without_an_archive_is_refused(shared: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "FIRST_PATIENCE_S", 1.0)
    address, _ = serve(shared)
    for wrong in ("nothing", ""):
        with pytest.raises(Incomplete, match=r"is not a finished archive.*expected the address of a folder"):
            open_archive(f"{address}/{wrong}")
    with pytest.raises(Refused, match=r"cannot fetch.*check the address and the network"):
        open_archive("http://127.0.0.1:9/a.redistill.zarr")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Files in memory at s3://, in place of the package that reads buckets."""
    fsspec = pytest.importorskip("fsspec", reason="torch brings it")

    class Bucket(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]  # it has no types
        protocol = "s3"
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]
        broken = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("s3:/"))

        def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
            if self.broken:
                raise RuntimeError(f"no credentials\nfor {path}")
            return super()._open(path, *arguments, **options)

    monkeypatch.setitem(
        sys.modules["fsspec.registry"]._registry, "s3", Bucket
    )  # for this test: others have a real server
    files = fsspec.filesystem("s3")
    yield files
    files.rm("/lab", recursive=True)


def test_an_fsspec_url(shared: Path, bucket: Any):
    bucket.put(str(shared / NAME), f"/lab/{NAME}", recursive=True)
    assert open_archive(f"s3://lab/{NAME}").id == open_archive(shared / NAME).id
    with pytest.raises(Incomplete):
        open_archive("s3://lab/other.redistill.zarr")


def test_errors_of_bucket_packages_are_one_line(bucket: Any, monkeypatch: pytest.MonkeyPatch):
    for patience in ("FIRST_PATIENCE_S", "PATIENCE_S"):
        monkeypatch.setattr(download, patience, 0.0)
    monkeypatch.setattr(type(bucket), "broken", True)
    bucket.makedirs("/lab")
    with pytest.raises(Refused, match=r"cannot fetch s3://lab/.*: no credentials for /lab/.*; check the"):
        open_archive("s3://lab/a.zarr")


def _fetch(address: str) -> str:
    return str(fetch_archive(address))


def test_concurrent_processes_share_a_copy(shared: Path, serve: Serve):
    address, requests = serve(shared)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        (path,) = set(pool.map(_fetch, [f"{address}/{NAME}"] * 3))
    assert verify(Path(path), full=True).ok
    assert sum(SHARD in request for request in requests) == 1


# -- ids --------------------------------------------------------------------------------------------------------------


def test_an_address_does_not_open_another_archive(shared: Path, serve: Serve):
    address, requests = serve(shared)
    open_archive(f"{address}/{NAME}")
    tiny_archive.make(shared / "two" / "x", teachers=())
    with pytest.raises(UsageError, match=r"has '.' or '..' as a part of its path"):
        open_archive(f"{address}/two/x/..")
    assert not any("two" in request for request in requests)


def test_a_pinned_archive_is_this_one_or_refused(shared: Path, serve: Serve):
    address, requests = serve(shared)
    identity, other = str(open_archive(shared / NAME).id), "f" * 64
    for location in (f"{address}/{NAME}", str(shared / NAME)):
        for pinned in (f"{location}#sha256={identity}", location):
            assert open_archive(pinned, id=identity).id == identity
        assert open_archive(f"{location}#sha256={identity}").id == identity
        for wrong, expected in ((f"{location}#sha256={other}", None), (location, other)):
            with pytest.raises(Refused, match=f"expected the archive with id {other}, found {identity}"):
                open_archive(wrong, id=expected)
        with pytest.raises(UsageError, match="remove one of the two"):
            open_archive(f"{location}#sha256={identity}", id=other)
        for wrong, expected in ((f"{location}#sha256={identity[:-1]}", None), (location, "../../x")):
            with pytest.raises(UsageError, match="expected the id of an archive"):
                open_archive(wrong, id=expected)
    assert fetch_archive(f"{address}/{NAME}", id=identity)
    before = len(requests)
    open_archive(f"{address}/{NAME}#sha256={identity}")
    assert len(requests) == before, "a copy with this id needs no server"


def test_an_unsealed_archive_has_no_id(tmp_path: Path):
    path = tmp_path / NAME
    tiny_archive.make(path)
    (path / "_redistill" / "manifest.json").unlink()
    with pytest.raises(Refused, match="not sealed"):
        open_archive(path, id="f" * 64, allow_partial=True)


def test_a_copy_with_another_manifest_is_not_trusted(shared: Path, serve: Serve, tmp_path: Path):
    address, _ = serve(shared)
    first = open_archive(f"{address}/{NAME}")
    tiny_archive.make(tmp_path / "other", teachers=())
    shutil.rmtree(first.path)
    shutil.copytree(tmp_path / "other", first.path)
    again = open_archive(f"{address}/{NAME}")
    assert again.id == first.id
    assert verify(again.path, full=True).ok


# -- without the server -----------------------------------------------------------------------------------------------


def test_a_whole_copy_needs_no_server(shared: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch):
    for patience in ("FIRST_PATIENCE_S", "PATIENCE_S"):
        monkeypatch.setattr(download, patience, 0.0)
    address, _ = serve(shared)
    copy = open_archive(f"{address}/{NAME}")
    away = f"http://127.0.0.1:9/{NAME}"
    with pytest.raises(Refused, match="cannot fetch"):
        open_archive(away)
    shutil.rmtree(shared / NAME)
    with pytest.raises(Incomplete):  # the server answers: it has no archive any more
        open_archive(f"{address}/{NAME}")
    monkeypatch.setenv("REDISTILL_OFFLINE", "1")
    assert open_archive(f"{address}/{NAME}").path == copy.path
    for other in (away, f"{address}/{NAME}#sha256={'f' * 64}"):
        with pytest.raises(Refused, match=r"was not fetched completely .* run the command once without --offline"):
            open_archive(other)


def test_a_server_that_is_away_is_named_in_one_line(shared: Path):
    said: list[str] = []
    with serving(Flaky(tiny_archive.contents(shared))) as flaky:
        address = f"{flaky.address}/{NAME}"
        copy = fetch_archive(address)
        flaky.leave()
        assert fetch_archive(address, notify=said.append) == copy
    (line,) = said
    assert f"cannot fetch {address}/" in line
    assert f"using the copy that was fetched before, id {open_archive(copy).id}" in line
    assert "\n" not in line


def test_an_unfinished_copy_is_not_used_offline(shared: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch):
    address, _ = serve(shared)
    copy = fetch_archive(f"{address}/{NAME}")
    (copy / "_redistill" / "manifest.json").unlink()
    monkeypatch.setenv("REDISTILL_OFFLINE", "1")
    with pytest.raises(Refused, match="was not fetched completely"):
        open_archive(f"{address}/{NAME}")


# -- metadata alone ---------------------------------------------------------------------------------------------------


def test_the_description_needs_the_metadata_only(shared: Path, serve: Serve, tmp_path: Path):
    address, requests = serve(shared)
    description = describe_at(f"{address}/{NAME}")
    assert description["path"] == f"{address}/{NAME}"
    assert description | {"path": ""} == describe_at(str(shared / NAME)) | {"path": ""}
    assert sorted(requests) == [
        f"/{NAME}/_redistill/manifest.json",
        f"/{NAME}/teachers/tiny/zarr.json",
        f"/{NAME}/zarr.json",
    ]
    assert not copies(tmp_path)
    with pytest.raises(Refused, match="expected the archive with id"):
        describe_at(f"{address}/{NAME}#sha256={'f' * 64}")


# -- killed and concurrent fetches ------------------------------------------------------------------------------------

STARTED = "import sys; from redistill_cache import fetch_archive; fetch_archive(sys.argv[1])"


def start_fetch(address: str, tmp_path: Path) -> subprocess.Popen[str]:
    """A process that fetches, once it waits for the rest of the shard, which its server does not send."""
    process = subprocess.Popen([sys.executable, "-c", STARTED, address], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(f"{SHARD}." in str(path) for path in partials(tmp_path)):
        assert process.poll() is None, process.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def partials(tmp_path: Path) -> list[Path]:
    """Path.rglob fails where another process removes a folder."""
    folders = ((Path(folder), names) for folder, _, names in os.walk(tmp_path / "cache"))
    return sorted(folder / name for folder, names in folders for name in names if name.endswith(".partial"))


def test_what_a_killed_fetch_left_is_swept_by_the_next_one(shared: Path, serve: Serve, tmp_path: Path):
    tiny_archive.make(shared / "second.zarr", teachers=())
    slow, _ = serve(shared, stuck=[f"/{NAME}/{SHARD}"])
    killed = start_fetch(f"{slow}/{NAME}", tmp_path)
    killed.kill()
    killed.communicate()
    assert partials(tmp_path)
    identity = str(open_archive(shared / NAME).id)
    (tmp_path / "cache" / "redistill" / "archives" / identity / "redistill-documents-old" / "teachers").mkdir(
        parents=True
    )
    address, _ = serve(shared)
    fetch_archive(f"{address}/second.zarr")
    assert not partials(tmp_path)
    assert not list((tmp_path / "cache").rglob("*documents-*"))
    assert verify(fetch_archive(f"{address}/{NAME}"), full=True).ok


def test_a_running_fetch_keeps_its_files_and_is_named_to_who_waits(shared: Path, serve: Serve, tmp_path: Path):
    tiny_archive.make(shared / "second.zarr", teachers=())
    slow, _ = serve(shared, stuck=[f"/{NAME}/{SHARD}"])
    address, _ = serve(shared)
    running = start_fetch(f"{slow}/{NAME}", tmp_path)
    waiting = None
    try:
        fetch_archive(f"{address}/second.zarr")
        assert partials(tmp_path)
        command = [sys.executable, "-c", STARTED, f"{address}/{NAME}"]
        waiting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert waiting.stderr is not None
        line = waiting.stderr.readline()
        assert f"waiting for process {running.pid} on " in line
        assert f"which fetches {address}/{NAME}" in line
        running.kill()
        _, err = waiting.communicate(timeout=120)
        assert (waiting.returncode, err) == (0, "")
    finally:
        for process in (running, waiting):
            if process is not None:
                process.kill()
                process.communicate()
