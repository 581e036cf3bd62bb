"""Cores and memory of a process, as limited by its control groups, and reads that need more memory than that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from redistill_cache import machine
from redistill_cache.errors import Refused
from redistill_cache.machine import require_memory, usable_cores, usable_memory


def kernel_files(tmp_path: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A cgroup folder and a membership file with these contents."""
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "cgroup", tmp_path / "membership"


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "900000 100000\n"}, 1),
        ("0::/elsewhere\n", {"cpu.max": "100000 100000\n"}, 1),
        ("9:name=systemd:/\n3:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1\n"}, None),
        ("3:cpu:/job\n", {"cpu/job/cpu.cfs_quota_us": "100000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 1),
        ("nonsense\n\n", {"cpu.max": "what?\n"}, None),
    ],
)
def test_usable_cores(tmp_path: Path, membership: str, files: dict[str, str], cores: int | None):
    """A quota limits the cores; of all parent groups, the smallest quota counts."""
    usable = usable_cores(*kernel_files(tmp_path, membership, files))
    assert usable == (len(os.sched_getaffinity(0)) if cores is None else cores)


def test_usable_memory(tmp_path: Path):
    assert (
        usable_memory(*kernel_files(tmp_path, "4:memory:/\n", {"memory/memory.limit_in_bytes": "1048576\n"})) == 1 << 20
    )
    assert usable_memory(*kernel_files(tmp_path, "0::/x\n", {"x/memory.max": "2097152\n"})) == 2 << 20
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert usable_memory(tmp_path, tmp_path / "no such file") == total


def test_memory_is_compared_with_the_limit_of_the_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "memory_limit", lambda: 2 << 30)  # as of a container
    require_memory(2 << 30, "a view")
    with pytest.raises(
        Refused, match=r"^a view: needs 3\.0 GiB of memory, this process may use 2\.0 GiB; use a machine"
    ):
        require_memory(3 << 30, "a view")
    monkeypatch.setattr(machine, "memory_limit", lambda: None)
    require_memory(1 << 60, "a view")
