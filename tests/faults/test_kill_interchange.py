"""`redistill archive import` and `export` killed at random moments: the same command again gives the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from redistill_cache import open_archive

from tests.redistill.interchange.fkd_files import write_fkd

KILLS = 3


def folder(path: Path) -> dict[str, str]:
    """The files of a finished folder without notes, which tell about runs."""
    files = (file for file in path.rglob("*") if file.is_file() and "notes" not in file.parts)
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """320 images of four classes, and FKD's files of them."""
    rng, keys = np.random.default_rng(0), []
    for label in range(4):
        (tmp_path / "images" / f"c{label}").mkdir(parents=True)
        for number in range(80):
            keys.append(f"c{label}/{label}_{number:02d}.png")
            pixels = Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8))
            pixels.resize((40, 44)).save(tmp_path / "images" / keys[-1])
    write_fkd(tmp_path / "fkd", tmp_path / "images", keys, rng.normal(0, 2, (len(keys), 4)))
    return tmp_path


def command(root: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"XDG_CACHE_HOME": str(root / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "redistill_cli", "archive", *arguments],
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(root: Path, *arguments: str) -> float:
    began = time.monotonic()
    process = command(root, *arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_imports_and_exports_are_finished_to_the_same_bytes(source: Path):
    def load(out: str) -> list[str]:
        recipe, rows = ["--recipe", "rrc?size=24"], ["--block-rows", "32"]
        return ["import", "fkd", "--from", "fkd", "--data", "folder:images", *recipe, *rows, "--out", out]

    def export(out: str) -> list[str]:
        return ["export", "whole", out, "--to", "webdataset", "--images", "folder:images", "--per-tar", "8"]

    draws, done = random.Random(3), 0
    for arguments in (load, export):
        whole = "whole" if arguments is load else "tars"
        seconds = finish(source, *arguments(whole))
        expected = folder(source / whole)
        for number in range(KILLS):
            out = f"{whole}-{number}"
            process = command(source, *arguments(out))
            time.sleep(seconds * draws.uniform(0.3, 1.0))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            done += (source / out).exists()
            finish(source, *arguments(out))
            assert folder(source / out) == expected
            assert not list((source / out).rglob("*.partial"))
    assert done  # at least one had begun to write
    assert open_archive(source / "whole", verify="full").num_views == 4
