"""Locks between processes of one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import multiprocessing
import pathlib
from redistill_cache.locks import locked

with locked(pathlib.Path("a"), "prepares a", print):
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()
    print("exit code", process.exitcode)
"""


def test_a_script_that_its_own_processes_run_again_ends(tmp_path: Path):
    """Without a guard of its main part, the process that is started waits for the one that started it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PATH": os.environ["PATH"],
    }
    run = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.stdout == "exit code 1\n"
    assert "put what the script does under \"if __name__ == '__main__':\"" in run.stderr
