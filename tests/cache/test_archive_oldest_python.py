"""The archive library on another interpreter than that of the tests: the oldest one at hand that is supported.

Python 3.11.2, the one of Debian 12, compiled a regular expression of the manifest wrongly and refused every archive.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from redistill_cache.verify import verify

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden-v1.redistill.zarr"
SYSTEM_PYTHON = Path("/usr/bin/python3")
READ_AND_WRITE = """
import hashlib, sys
import redistill_cache
from redistill_cache.verify import verify
from tests.faults import scenario
golden, new = sys.argv[1:]
assert verify(golden, full=True).ok
print(hashlib.sha256(redistill_cache.open_archive(golden).logits(0, range(16)).tobytes()).hexdigest())
print(scenario.write_archive(new))
"""


def system_version() -> tuple[int, ...]:
    code = "import sys; print(*sys.version_info[:3])"
    done = subprocess.run([SYSTEM_PYTHON, "-c", code], capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


def test_the_system_s_python_reads_and_writes_the_golden_archive(tmp_path: Path):
    if not SYSTEM_PYTHON.exists():
        pytest.skip(f"{SYSTEM_PYTHON} is not installed")
    version = system_version()
    if version[:2] != sys.version_info[:2] or version == sys.version_info[:3]:
        pytest.skip("compiled packages of this environment need another patch release of the same Python")
    packages = Path(np.__file__).parents[1]
    path = os.pathsep.join(map(str, [ROOT, ROOT / "cache", packages]))
    environment = {**os.environ, "PYTHONPATH": path}
    here, there = (
        subprocess.run(
            [python, "-c", READ_AND_WRITE, GOLDEN, tmp_path / f"{name}.redistill.zarr"],
            env=environment, capture_output=True, text=True, timeout=240, check=False,
        )
        for name, python in (("here", sys.executable), ("there", SYSTEM_PYTHON))
    )  # fmt: skip
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout  # the same values and the same id
    assert verify(tmp_path / "there.redistill.zarr", full=True).ok
