"""`redistill archive`, `inspect` and `cache-teacher` as processes: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from redistill_cache import open_archive

from tests.small_archive import DATA, cache

OTHER = "demo:tiny?num_classes=8&weights=random"


@pytest.fixture
def run(tmp_path: Path):
    def call(*arguments: str | Path, answer: str = "") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "NO_COLOR": "1", "COLUMNS": "120"}
        command = [sys.executable, "-m", "redistill_cli", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, input=answer, timeout=300
        )

    return call


@pytest.mark.slow
def test_a_teacher_is_added_by_name_and_removed(run, tmp_path: Path):
    path = cache(tmp_path / "a.redistill.zarr", views=2, recipe="rrc?size=28&aa=rand-m5-n2")
    first = open_archive(path).id
    add = ["cache-teacher", DATA, "--teacher", OTHER, "--out", path, "--seed", "5", "--workers", "0"]
    refused = run(*add, "--views", "2")
    assert refused.returncode == 3
    [line] = [line for line in refused.stderr.splitlines() if line]
    assert "holds the teacher small" in line
    assert "--teacher-name tiny" in line
    added = run(*add, "--views", "1", "--teacher-name", "b")
    assert added.returncode == 0, added.stderr
    shown = run("inspect", path)
    assert "2; teacher b has 1" in shown.stdout
    assert "rrc?size=28&aa=rand-m5-n2" in shown.stdout
    train = run("train", DATA, "--archive", path, "--student", OTHER, "--out", "run", "--workers", "0")
    assert train.returncode == 3
    assert "--teacher-names b,small" in train.stderr
    declined = run("archive", "remove-teacher", path, "b", answer="n\n")
    assert declined.returncode == 1
    assert set(open_archive(path).teachers) == {"b", "small"}
    removed = run("archive", "remove-teacher", path, "b", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert "freed" in removed.stdout
    assert open_archive(path, verify="full").id == first
    again = run("archive", "remove-teacher", path, "b", "--yes")
    assert (again.returncode, again.stderr.count("\n")) == (3, 1)
    assert "no teacher 'b'; teachers: small" in again.stderr


def test_licence_and_citation_are_set_later(run, tmp_path: Path):
    path = cache(tmp_path / "a.redistill.zarr", views=1)
    edited = run("archive", "edit", path, "--licence", "CC0-1.0")
    assert edited.returncode == 0, edited.stderr
    description = json.loads(run("inspect", path, "--json").stdout)
    assert (description["licence"], description["citation"]) == ("CC0-1.0", "")
    assert description["id"] in edited.stdout
    apart = run(
        "archive", "edit", path, "--data-source", "glyphs", "--data-licence", "mit", "--teacher-licence", "MIT-0"
    )
    assert apart.returncode == 0, apart.stderr
    shown = run("inspect", path).stdout
    for name, value in {
        "licence": "CC0-1.0",
        "images from": "glyphs",
        "image licence": "MIT",
        "teacher licence": "MIT-0",
    }.items():
        assert re.search(rf"^{name} +{value}$", shown, re.MULTILINE), name
    free_text = run("archive", "edit", path, "--data-licence", "ask the authors")
    assert (free_text.returncode, free_text.stderr.count("\n")) == (2, 1)
    assert "--data-licence must be an SPDX expression" in free_text.stderr
    assert run("verify", path, "--full").returncode == 0
    nothing = run("archive", "edit", path)
    assert nothing.returncode == 2
    assert "--licence or --citation" in nothing.stderr
    missing = run("archive", "edit", tmp_path / "none", "--licence", "MIT")
    assert (missing.returncode, missing.stderr.count("\n")) == (3, 1)


def test_pack_and_fetch_by_and_by(run, tmp_path: Path, serve):
    path = cache(tmp_path / "shared" / "a.redistill.zarr", views=3)
    packed = path.with_name("a.redistill")
    done = run("archive", "pack", path, packed)
    assert (done.returncode, done.stderr) == (0, "")
    assert "5 files, " in done.stdout
    address, _ = serve(path.parent)
    identity = open_archive(path).id
    for location, views, held in ((f"{address}/a.redistill", "1", "view 0 of 3"), (str(path), "2", "views 0-1 of 3")):
        fetched = run("archive", "fetch", location, tmp_path / "out", "--views", views)
        assert (fetched.returncode, fetched.stderr) == (0, "")
        assert fetched.stdout == f"{tmp_path / 'out'}: id {identity}, holds {held}\n"
        assert f"a copy that holds {held}" in run("inspect", tmp_path / "out").stdout
        verified = run("verify", tmp_path / "out", "--full")
        assert verified.returncode == 0
        assert f"; a copy that holds {held}" in verified.stdout
    train = ("train", DATA, "--student", "demo:tiny", "--workers", "0", "--epochs", "1", "--device", "cpu", "--dry-run")
    dry = run(*train, "--archive", tmp_path / "out", "--out", "run")
    assert dry.returncode == 0, dry.stderr
    assert ", 2 views" in dry.stdout + dry.stderr
    edit = run("archive", "edit", tmp_path / "out", "--licence", "CC0-1.0")
    assert (edit.returncode, edit.stderr.count("\n")) == (3, 1)
    assert "holds a part of its archive only" in edit.stderr
    more = run("archive", "fetch", packed, tmp_path / "out", "--views", "4")
    assert (more.returncode, more.stderr.count("\n")) == (3, 1)
    assert "has 3 views, 4 are asked for" in more.stderr
    rest = run("archive", "fetch", packed, tmp_path / "out")
    assert "holds views 0-2 of 3" in rest.stdout
    assert "complete" in run("inspect", tmp_path / "out").stdout
    dry = run(*train, "--archive", f"{address}/a.redistill", "--out", "run2")
    assert ", 3 views" in dry.stdout + dry.stderr
