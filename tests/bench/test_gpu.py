"""bench/gpu.py, the acceptance on a GPU: what can run on a CPU runs here, at a tiny size."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import gpu

# These start processes, or train for a while.
SLOW = ("archives", "steps", "tests", "training", "stage 1")
CHECKS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in gpu.CHECKS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_gpu_is_told_in_one_line(tmp_path: Path):
    command = [sys.executable, str(gpu.ROOT / "bench" / "gpu.py"), "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100, env=gpu.environment())
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines() == [gpu.NO_GPU]
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_runs_and_passes(tmp_path: Path, name: str):
    setting = gpu.Setting(torch.device("cpu"), tmp_path, quick=True)
    rows = gpu.outcomes(setting, name, time.monotonic() + 300)
    assert rows
    assert [row for row in rows if not row["passed"]] == []
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_raises_or_has_no_time_left_is_a_row_that_failed(tmp_path: Path):
    setting = gpu.Setting(torch.device("cpu"), tmp_path, quick=True, logits=tmp_path / "missing.npz")
    (row,) = gpu.outcomes(setting, "encoder", time.monotonic() + 300)
    assert (row["name"], row["passed"]) == ("raised", False)
    assert "missing.npz" in row["value"]
    (row,) = gpu.outcomes(setting, "stage 1", time.monotonic() - 1)
    assert (row["name"], row["passed"]) == ("not run", False)
