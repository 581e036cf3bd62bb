"""`redistill archive import` and `export` on the command line: options and output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from redistill_cache import open_archive
from redistill_cache.errors import Refused
from redistill_cli.app import app
from typer.testing import CliRunner


def run(*arguments: str) -> str:
    """Standard output of the command; what it raises becomes the exit code in redistill_cli.__main__."""
    result = CliRunner().invoke(app, ["archive", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_table_is_imported_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names, rows = [], np.random.default_rng(0).normal(0, 1, (6, 3)).astype(np.float32)
    for label in range(3):
        (tmp_path / "images" / f"c{label}").mkdir(parents=True)
        for number in range(2):
            names.append(f"{label}{number}")
            image = Image.new("RGB", (20, 24), (9 * label, 30 * number, 7))
            image.save(tmp_path / "images" / f"c{label}/{names[-1]}.png")
    np.savez(tmp_path / "t.npz", names=np.array(names), logits=rows)
    load = ["import", "t.npz", "--from", "table", "--data", "images", "--recipe", "center?size=16", "--out", "a"]
    with pytest.raises(Refused, match=r"the data has 'c0/00\.png', the source '00'"):
        run(*load)
    load += ["--match", "stem", "--codec", "float32"]
    assert "not written: a dry run" in run(*load, "--dry-run")
    assert not (tmp_path / "a").exists()
    printed = json.loads(run(*load, "--json"))
    archive = open_archive(tmp_path / "a", id=printed["id"])
    assert printed["audit"] == archive.teacher("imported").model["audit"]
    shown = run(*load)
    assert archive.id in shown
    assert all(sentence in shown for sentence in printed["audit"])
    assert "n: a dry run: 1 file, rows of 72 B" in run("export", "a", "n", "--to", "npz", "--dry-run")
    assert "n: 1 file, " in run("export", "a", "n", "--to", "npz")
    assert "1 of them was there" in run("export", "a", "n", "--to", "npz", "--views", "0")
    with np.load(tmp_path / "n" / "view-0000.npz") as arrays:
        np.testing.assert_array_equal(arrays["logits"], archive.logits(0))
