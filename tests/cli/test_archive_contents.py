"""`redistill archive skeleton`, `merge` and `subset`: output, exit codes, one-line errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from redistill_cache import open_archive
from redistill_cache.writer import ArchiveWriter
from redistill_cli.__main__ import main

from tests import tiny_archive
from tests.tiny_archive import fill, make, start

SPEC = replace(tiny_archive.SPEC, num_samples=20, num_views=2, block_rows=8)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(ram: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(ram / "cache"))
    monkeypatch.chdir(ram)
    return ram


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("archive", ...) -> exit code, stdout, stderr; in this process, as a new one takes seconds to start."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["redistill", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return call


def test_two_labs_write_one_archive(run: Run, folder: Path):
    identity = make(folder / "whole", SPEC)
    first = start(folder / "a", SPEC)
    assert run("archive", "skeleton", "a", "b") == (0, "b: 20 samples, 2 views to be written\n", "")
    second = ArchiveWriter.resume(folder / "b", SPEC)
    fill(first, ["views", "canaries"])
    for index, writer in enumerate((first, second)):
        for block in writer.missing("teachers/tiny")[index:5:2]:
            writer.write(block, *tiny_archive.block_data(block, SPEC))
    merge = ("archive", "merge", "a", "b", "--out", "c")
    missing = "1 blocks are missing, the first is teachers/tiny view 1 block 2"
    code, out, err = run(*merge, "--dry-run")
    assert (code, err) == (0, "")
    assert out.startswith("c: 15 blocks, ")
    assert out.endswith(f"KiB to copy, teachers tiny; {missing}\n")
    assert not (folder / "c").exists()
    assert run(*merge) == (0, f"c: unfinished: {missing}\n", "")
    assert run("verify", "c")[0] == 1
    fill(second)
    assert run(*merge) == (0, f"c: id {identity}\n", "")
    assert run(*merge) == (0, f"c: id {identity}\n", "")
    assert run("verify", "c", "--full")[0] == 0
    make(folder / "other", replace(SPEC, seed=8))
    code, out, err = run("archive", "merge", "a", "other", "--out", "d")
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert f"seed is 7 in {folder / 'a'}, 8 in {folder / 'other'}" in err
    code, _, err = run("archive", "merge", "a", "--out", "d")
    assert (code, err) == (2, "redistill: expected at least two archives to merge, found 1\n")


def test_a_subset_says_what_it_holds(run: Run, folder: Path):
    make(folder / "p", SPEC)
    archive = open_archive(folder / "p")
    labels = archive.labels
    few = sum(min(2, int((labels == label).sum())) for label in range(6))
    subset = ("archive", "subset", "p", "s", "--per-class", "2", "--views", "1:2")
    code, out, err = run(*subset, "--dry-run")
    assert (code, err) == (0, "")
    assert out.startswith(f"s: {few} of 20 samples, 1 of 2 views, about ")
    assert not (folder / "s").exists()
    code, out, err = run(*subset)
    identity = open_archive(folder / "s").id
    assert (code, out, err) == (0, f"s: id {identity}, {few} of 20 samples, 1 of 2 views\n", "")
    assert run(*subset) == (code, out, err)
    code, out, err = run("inspect", "s")
    assert f"{archive.id}, its views 1\n" in out
    assert "KL 3e-08" in out
    alone = next(row for row in range(20) if row not in archive.canaries(0)[0])
    code, out, err = run(
        "archive", "subset", "p", "t", "--rows", f"{alone}:{alone + 1}", "--classes", str(labels[alone])
    )
    assert (code, out.split(", ", 1)[1]) == (0, "1 of 20 samples, 2 of 2 views\n")
    assert err.startswith("redistill: warning: no canary is among these rows")
    assert "no canaries" in run("inspect", "t")[1]
    for arguments, code, message in (
        ((), 2, "nothing to choose; give --views, --rows, --per-class or --classes"),
        (("--views", "2,1"), 2, "--views 2,1: expected at least one view, in rising order, each once"),
        (("--views", "3"), 3, "--views 3: the archive has views 0 to 1"),
        (("--rows", "none.txt"), 3, "cannot read none.txt: No such file or directory; check the disk and the path"),
        (
            ("--classes", "wolf"),
            3,
            f"--classes: {folder / 'p'} has no class 'wolf'; give names or numbers of its classes",
        ),
    ):
        assert run("archive", "subset", "p", "u", *arguments) == (code, "", f"redistill: {message}\n")
    assert not (folder / "u").exists()
