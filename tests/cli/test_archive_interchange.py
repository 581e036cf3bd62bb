"""`redistill archive import` and `export` as processes: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from redistill_cache import open_archive


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "NO_COLOR": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "redistill_cli", "archive", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        timeout=300,
    )


def test_a_table_is_imported_and_exported(tmp_path: Path):
    names, rows = [], np.random.default_rng(0).normal(0, 1, (6, 3)).astype(np.float32)
    for label in range(3):
        (tmp_path / "images" / f"c{label}").mkdir(parents=True)
        for number in range(2):
            names.append(f"{label}{number}")
            Image.new("RGB", (20, 24), (9 * label, 30 * number, 7)).save(
                tmp_path / "images" / f"c{label}/{names[-1]}.png"
            )
    np.savez(tmp_path / "t.npz", names=np.array(names), logits=rows)
    load = ["import", "t.npz", "--from", "table", "--data", "images", "--recipe", "center?size=16", "--out", "a"]
    refused = run(tmp_path, *load)
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 1)
    assert "the data has 'c0/00.png', the source '00'" in refused.stderr
    done = run(tmp_path, *load, "--match", "stem", "--codec", "float32", "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    archive = open_archive(tmp_path / "a", id=printed["id"])
    assert printed["audit"] == archive.teacher("imported").model["audit"]
    exported = run(tmp_path, "export", "a", "n", "--to", "npz")
    assert exported.returncode == 0, exported.stderr
    assert "n: 1 files, " in exported.stdout
    with np.load(tmp_path / "n" / "view-0000.npz") as arrays:
        np.testing.assert_array_equal(arrays["logits"], archive.logits(0))
