"""Archives at a URL: fetched once, verified, and refused when they differ from their manifest."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redistill_cache import download, fetch_archive, open_archive
from redistill_cache.addresses import parse_address
from redistill_cache.errors import Damaged, Incomplete, Refused
from redistill_cache.verify import verify

from tests import tiny_archive

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
    assert requests[before:] == [f"/{NAME}/_redistill/manifest.json"]
    assert not steps


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


def test_a_connection_that_closes_every_time_is_an_error(shared: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0))
    address, requests = serve(shared)
    with pytest.raises(
        Refused, match=r"cannot fetch .*: the connection closed after \d+ of \d+ bytes; check the address"
    ):
        download.read_address(parse_address(f"{address}/{NAME}/{SHARD}.short"), 1 << 20)
    assert len(requests) == 3


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


def test_an_address_without_an_archive_is_refused(shared: Path, serve: Serve):
    address, _ = serve(shared)
    for wrong in ("nothing", ""):
        with pytest.raises(Incomplete, match=r"is not a finished archive.*expected the address of a folder"):
            open_archive(f"{address}/{wrong}")
    with pytest.raises(Refused, match=r"cannot fetch.*check the address and the network"):
        open_archive("http://127.0.0.1:9/a.redistill.zarr")


@pytest.fixture
def bucket() -> Iterator[Any]:
    """Files in memory at s3://, in place of the package that reads buckets."""
    fsspec = pytest.importorskip("fsspec", reason="torch brings it")

    class Bucket(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]  # it has no types
        protocol = "s3"
        store: dict[str, Any] = {}
        pseudo_dirs = [""]
        broken = False

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("s3:/"))

        def _open(self, path: str, *arguments: Any, **options: Any) -> Any:
            if self.broken:
                raise RuntimeError(f"no credentials\nfor {path}")
            return super()._open(path, *arguments, **options)

    fsspec.register_implementation("s3", Bucket, clobber=True)
    files = fsspec.filesystem("s3")
    yield files
    files.rm("/lab", recursive=True)


def test_an_fsspec_url(shared: Path, bucket: Any):
    bucket.put(str(shared / NAME), f"/lab/{NAME}", recursive=True)
    assert open_archive(f"s3://lab/{NAME}").id == open_archive(shared / NAME).id
    with pytest.raises(Incomplete):
        open_archive("s3://lab/other.redistill.zarr")


def test_errors_of_bucket_packages_are_one_line(bucket: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0))
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
