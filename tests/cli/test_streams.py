"""Commands whose output cannot be written: they end as if it had been, and say what was lost where that is possible."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redistill_cli.streams import Stream

from tests.small_archive import DATA, TEACHER, cache

ROOT = Path(__file__).resolve().parents[2]
CACHE = f"cache-teacher '{DATA}' --teacher '{TEACHER}' --views 2 --out made.zarr --workers 0"
TRAIN = f"train '{DATA}' --archive {{archive}} --student demo:tiny --epochs 2 --lr 0.05 --workers 0 --out run"
INSPECT = "inspect {archive}"
FILES = {CACHE: "made.zarr/_redistill/manifest.json", TRAIN: "run/report.html"}

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("archive") / "teacher.redistill.zarr")


@pytest.fixture
def shell(tmp_path: Path, archive: Path) -> Shell:
    """shell(command, "> /dev/full") -> the finished process; `$?` is that of redistill in a pipe, too."""

    def call(command: str, redirection: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        search = os.pathsep.join(str(ROOT / part) for part in ("", "cache", "cli"))
        environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", **variables}
        line = f"{sys.executable} -m redistill_cli {command.format(archive=archive)} {redirection}"
        script = ["bash", "-c", f"set -o pipefail; {line}"]
        return subprocess.run(
            script, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=200, check=False
        )

    return call


REDIRECTIONS = ("2>&1 | true", ">/dev/full", ">&- 2>&- <&-")
SLOW = ("| true", "2>/dev/full", ">&-", "2>&-", ">/dev/full 2>/dev/full")


@pytest.mark.parametrize(
    "command",
    [pytest.param(CACHE, marks=pytest.mark.slow), pytest.param(TRAIN, marks=pytest.mark.slow), INSPECT],
    ids=["cache-teacher", "train", "inspect"],
)
@pytest.mark.parametrize("redirection", [*REDIRECTIONS, *(pytest.param(text, marks=pytest.mark.slow) for text in SLOW)])
def test_output_that_is_lost_does_not_end_a_command(shell: Shell, tmp_path: Path, command: str, redirection: str):
    process = shell(command, redirection)
    full = ">/dev/full" in redirection.split()
    assert process.returncode == (3 if full else 0), process.stderr
    assert "Traceback" not in process.stderr
    if full and "2>" not in redirection:
        assert process.stderr.splitlines()[-1] == "redistill: standard output is incomplete: No space left on device"
    if command in FILES:
        assert (tmp_path / FILES[command]).is_file()


def test_messages_do_not_land_in_a_file_that_takes_the_number_of_a_closed_stream(shell: Shell, tmp_path: Path):
    """As stdout is closed, the first file that is opened would be descriptor 1."""
    assert shell(TRAIN, "--json >&- 2>&-").returncode == 0
    assert json.loads((tmp_path / "run/result.json").read_text())["epochs"] == 2


def test_a_character_that_the_encoding_lacks_is_no_error(shell: Shell, tmp_path: Path, archive: Path):
    shutil.copytree(archive, tmp_path / "é.zarr")
    process = shell("inspect é.zarr", PYTHONIOENCODING="ascii")
    assert process.returncode == 0, process.stderr
    assert ".zarr" in process.stdout


def test_a_slow_reader_of_a_pipe_in_non_blocking_mode_gets_everything():
    """Another process that shares the pipe may have set the mode; the text is longer than a pipe holds."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open(reading, "rb") as reader, ThreadPoolExecutor(1) as pool:  # noqa: PTH123  a descriptor
        received = pool.submit(lambda: (time.sleep(0.2), reader.read())[1])
        io.BufferedWriter(Stream(writing)).write(b"x" * 1_000_000)
        os.close(writing)
        assert len(received.result(60)) == 1_000_000
