"""The jobs in examples/slurm, run by a stand-in for SLURM with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from redistill_cache import open_archive

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
DATA = "synthetic?n=120&classes=4"
TEACHER = "demo:tiny?num_classes=4&weights=random"


@pytest.fixture
def sbatch(tmp_path: Path):
    """sbatch("cache.sbatch", ARRAY="0-2") -> the finished job."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/docs/slurm.py {name} "$@"\n')
    for name, module in (("redistill", "redistill_cli"), ("torchrun", "torch.distributed.run")):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    search = os.pathsep.join(str(ROOT / part) for part in ("", "cache", "cli"))
    environment = {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment |= {"SCRATCH": str(tmp_path), "DATA": DATA, "TEACHER": TEACHER, "VIEWS": "2"}

    def call(job: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sbatch", str(ROOT / "examples" / "slurm" / job)],
            env=os.environ | environment | variables | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return call


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_jobs_are_valid_bash(job: Path):
    checked = subprocess.run(["bash", "-n", job], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_array_writes_the_archive_that_the_next_jobs_verify_and_train_from(sbatch, tmp_path: Path):
    before = sbatch("verify.sbatch", ARCHIVE=str(tmp_path / "resnet50.redistill.zarr"))
    assert before.returncode == 3, "there is no archive yet, so the dependent job fails"
    cached = sbatch("cache.sbatch", ARRAY="0-2")
    assert cached.returncode == 0, cached.stderr
    archive = open_archive(tmp_path / "resnet50.redistill.zarr")
    assert (archive.num_views, archive.num_samples) == (2, 120)
    verified = sbatch("verify.sbatch")
    assert verified.returncode == 0, verified.stderr
    student = "--student demo:tiny --epochs 1 --workers 0 --batch-size 24"
    trained = sbatch("train.sbatch", NODES="2", GPUS="1", OPTIONS=student, RUNS=str(tmp_path / "run"))
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "student.safetensors").exists()
