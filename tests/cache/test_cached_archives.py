"""The archives in the cache folder: least used first, within a limit, and never one that a process uses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redistill_cache import cached_archives, fetch_archive, locks, open_archive
from redistill_cache.cached_archives import CachedArchive, parse_bytes, remove, to_remove
from redistill_cache.copies import Held
from redistill_cache.errors import Refused, UsageError
from redistill_cache.packing import pack

from tests import tiny_archive

# Holds archives until its input ends.
USE = "import sys; from redistill_cache import open_archive; opened = list(map(open_archive, sys.argv[1:])); "
USE += "print(flush=True); sys.stdin.read(); print(*(archive.logits(1).shape[1] for archive in opened))"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(cached_archives.LIMIT, raising=False)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three archives of about the same size."""
    tmp_path, paths = tmp_path_factory.mktemp("packed"), []
    for name in ("a", "b", "d"):
        tiny_archive.make(tmp_path / name, teachers=(name,))
        pack(tmp_path / name, tmp_path / f"{name}.redistill")
        paths.append(tmp_path / f"{name}.redistill")
    return paths


@contextmanager
def in_use(*locations: Path) -> Iterator[None]:
    command = [sys.executable, "-c", USE, *locations]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "\n"
            yield
        finally:
            out, _ = process.communicate("", timeout=60)
        assert (process.returncode, out.split()) == (0, ["6"] * len(locations))


def listed() -> list[tuple[str, bool]]:
    return [(archive.name, archive.in_use) for archive in cached_archives.cached_archives()]


def test_the_least_used_archive_makes_room_and_none_that_is_in_use(packed: list[Path], monkeypatch):
    a, b, d = packed
    with in_use(a, b):
        assert {used for _, used in listed()} == {True}
        assert {name for name, _ in listed()} == {"a.redistill.zarr", "b.redistill.zarr"}
        size = max(archive.nbytes for archive in cached_archives.cached_archives())
        monkeypatch.setenv(cached_archives.LIMIT, str(int(2.5 * size)))
        with pytest.raises(Refused, match=r"needs .* REDISTILL_CACHE_LIMIT is .*, and what is in use takes") as refused:
            fetch_archive(str(d))
        assert "\n" not in str(refused.value)
        assert len(listed()) == 2
        assert not any(map(remove, cached_archives.cached_archives()))
    assert {used for _, used in listed()} == {False}
    copies = {archive.name: archive.folder for archive in cached_archives.cached_archives()}
    os.utime(copies["b.redistill.zarr"] / locks.USED, (1e9, 1e9))
    assert listed()[0] == ("b.redistill.zarr", False)
    said: list[str] = []
    with in_use(copies["b.redistill.zarr"] / "b.redistill.zarr"):  # by its path; used last now
        fetch_archive(str(d), notify=said.append)
    (line,) = said
    assert line.startswith("removed a.redistill.zarr (")
    assert {name for name, _ in listed()} == {"b.redistill.zarr", "d.redistill.zarr"}
    monkeypatch.delenv(cached_archives.LIMIT)
    assert open_archive(fetch_archive(str(a)), verify="full").complete, "fetched again"


def test_an_archive_that_cannot_fit_is_refused_and_nothing_is_removed(packed: list[Path], monkeypatch):
    fetch_archive(str(packed[0]))
    monkeypatch.setenv(cached_archives.LIMIT, "10KB")
    with pytest.raises(Refused, match=r"needs .* more, REDISTILL_CACHE_LIMIT is 9\.8 KiB") as refused:
        fetch_archive(str(packed[1]))
    assert "\n" not in str(refused.value)
    assert listed() == [("a.redistill.zarr", True)]


def test_what_another_process_removes_meanwhile_is_no_error(packed: list[Path], monkeypatch: pytest.MonkeyPatch):
    with in_use(packed[0]):
        pass
    archives = cached_archives.cached_archives()
    assert [remove(archive) for archive in (*archives, *archives)] == [True, True]
    with in_use(packed[0]):
        pass
    measure = cached_archives.size_of
    monkeypatch.setattr(cached_archives, "size_of", lambda folder: (measure(folder), shutil.rmtree(folder))[0])
    assert listed() == []


def test_copies_with_some_views_and_unfinished_ones_are_listed(packed: list[Path]):
    copy = fetch_archive(str(packed[0]), views=2)
    (archive,) = cached_archives.cached_archives()
    assert (archive.held, archive.views, archive.in_use, archive.id) == (Held(2), 3, True, open_archive(copy).id)
    (copy / "_redistill/manifest.json").write_bytes(b"{}")
    (archive,) = cached_archives.cached_archives()
    assert (archive.held, archive.views) == (None, None)


def test_sizes(monkeypatch: pytest.MonkeyPatch):
    for text, expected in {"0": 0, "5": 5, "20GB": 20e9, "1.5 TiB": 1.5 * 2**40, "3k": 3000, "2MiB": 2 << 20}.items():
        assert parse_bytes(text, "x") == expected
    for wrong in ("", "GB", "-1", "1e9", "20 G B", "1PB", "nan", "9" * 30):
        with pytest.raises(UsageError, match="expected a size such as 200GB"):
            parse_bytes(wrong, "x")
    monkeypatch.setenv(cached_archives.LIMIT, "many")
    with pytest.raises(UsageError, match="REDISTILL_CACHE_LIMIT: expected a size"):
        cached_archives.cache_limit()


def test_no_more_is_removed_than_is_needed():
    archives = [CachedArchive(Path(name), name, 1, 1, 10, 0.0, name == "b") for name in "abcd"]
    for excess, chosen in {-5: "", 0: "", 1: "a", 10: "a", 11: "ac", 40: "acd"}.items():
        assert [archive.name for archive in to_remove(archives, excess)] == list(chosen)
