"""Every hostile archive is refused in one line, within a second of CPU time and 200 MB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks.hostile import ATTACKS, reseal
from tests.faults.scenario import write_archive

ROOT = Path(__file__).resolve().parents[2]


def measure(path: Path, cache: Path) -> dict[str, float | str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "cache")]),
        "XDG_CACHE_HOME": str(cache),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.attacks.measure", str(path)],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, float | str] = json.loads(done.stdout)
    return found


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "a.redistill.zarr"
    write_archive(path)
    return path


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_quickly_and_cheaply(archive: Path, tmp_path: Path, name: str):
    ATTACKS[name](archive)
    found = measure(archive, tmp_path / "cache")
    verdict = str(found["verdict"])
    assert verdict != "believed"
    assert "\n" not in verdict
    assert len(verdict) < 1000
    assert float(found["cpu"]) < 1.0, verdict
    assert float(found["grown"]) < 200, verdict


def test_the_honest_archive_is_believed(archive: Path, tmp_path: Path):
    """Else every attack above would be refused for nothing. Resealing changes nothing either."""
    assert measure(archive, tmp_path / "cache")["verdict"] == "believed"
    before = (archive / "_redistill/manifest.json").read_bytes()
    reseal(archive)
    assert (archive / "_redistill/manifest.json").read_bytes() == before
