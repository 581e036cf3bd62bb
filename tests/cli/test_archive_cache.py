"""`redistill archive cache`: what it lists, and what it removes."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from redistill_cache import locks
from redistill_cli.__main__ import main

from tests import tiny_archive

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("REDISTILL_CACHE_LIMIT", raising=False)

    def call(*arguments: object, answer: str = "") -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command."""
        monkeypatch.setattr("sys.argv", ["redistill", "archive", "cache", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, Path]:
    """Two copies, "old" used before "new", as a process that ended has left them."""
    folders = {}
    for number, name in enumerate(("old", "new")):
        identity = tiny_archive.make(tmp_path / name, teachers=(name,))
        folder = tmp_path / "cache" / "redistill" / "archives" / identity
        folder.mkdir(parents=True)
        shutil.move(tmp_path / name, folder / f"{name}.zarr")
        (folder / locks.USED).touch()
        os.utime(folder / locks.USED, (1e9 + number, 1e9 + number))
        folders[name] = folder
    return folders


def test_an_empty_cache_folder(run: Run):
    code, out, err = run("list")
    assert (code, err) == (0, "")
    assert "0 archives, 0 B" in out
    assert run("prune", "--max-size", "0")[:2] == (0, "kept 0 archives, 0 B\n")


def test_archives_are_listed_with_what_they_hold(run: Run, copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REDISTILL_CACHE_LIMIT", "1GB")
    (copies["new"] / "new.zarr/_redistill/manifest.json").unlink()
    code, out, err = run("list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].split()[:5] == ["old.zarr", copies["old"].name[:12], "3", "of", "3"]
    assert "2001-09-0" in lines[1]
    assert "not finished" in lines[2]
    assert "2 archives" in lines[3]
    assert "of 953.7 MiB that REDISTILL_CACHE_LIMIT allows" in lines[3]
    found = json.loads(run("list", "--json")[1])
    assert [(each["archive"], each["views_held"], each["in_use"]) for each in found["archives"]] == [
        ("old.zarr", 3, False),
        ("new.zarr", None, False),
    ]


def test_prune_asks_and_removes_the_least_used(run: Run, copies: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    size = json.loads(run("list", "--json")[1])["archives"][1]["bytes"]
    code, _, err = run("prune")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--max-size 20GB, or REDISTILL_CACHE_LIMIT" in err
    assert run("prune", "--max-size", "a lot")[0] == 2
    code, out, _ = run("prune", "--max-size", size, answer="n\n")
    assert code == 1
    assert "Remove 1 archive, " in out
    assert all(folder.exists() for folder in copies.values())
    monkeypatch.setenv("REDISTILL_CACHE_LIMIT", str(size))
    code, out, _ = run("prune", "--yes")
    assert code == 0
    assert out.splitlines()[0].startswith(f"removed old.zarr {copies['old'].name[:12]}, ")
    assert not copies["old"].exists()
    with locks.lock_file(copies["new"] / locks.USE) as file:
        assert locks.acquire(file)  # as a process that uses it
        assert "in use" in run("list")[1]
        code, out, _ = run("prune", "--max-size", "0", "--yes")
        assert (code, out) == (0, f"kept 1 archive, {out.split(', ')[1]}, as they are in use\n")
    assert run("prune", "--max-size", "0", "--yes")[0] == 0
    assert not copies["new"].exists()
