"""Limits on cores and memory, as read from files of the kernel; and what doctor reads and reports."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from redistill_cache.errors import Refused
from redistill_cache.machine import usable_cores, usable_memory

from redistill import doctor
from redistill.doctor import examine, open_views
from tests import tiny_archive


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


class ManyImages:
    """A million images; records which of them are read."""

    def __init__(self, count: int = 1_000_000) -> None:
        self.count = count
        self.read: set[int] = set()

    def __len__(self) -> int:
        return self.count

    def sample(self, i: int) -> tuple[np.ndarray, int, str]:
        self.read.add(i)
        return np.full((32, 32, 3), i % 256, np.uint8), 0, str(i)


def test_only_a_few_images_of_a_large_set_are_read():
    images = ManyImages()
    dataset = open_views(images, None)
    assert len(dataset.__getitems__(dataset.indices(0).tolist())) == len(images.read) == doctor.MAX_IMAGES
    assert min(images.read) == 0
    assert max(images.read) > 900_000
    assert len(open_views(ManyImages(3), None)) == 3
    with pytest.raises(Refused, match="no image"):
        open_views(ManyImages(0), None)


def test_an_archive_without_teachers_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "SECONDS_PER_RATE", 0.01)
    tiny_archive.make(tmp_path / "bare.zarr", teachers=())
    diagnosis = examine(archive=tmp_path / "bare.zarr", folder=tmp_path)
    assert diagnosis.archive_load_rows_per_second is None
    assert any("has no teacher yet" in advice for advice in diagnosis.advice)
    tiny_archive.make(tmp_path / "full.zarr")
    rate = examine(archive=tmp_path / "full.zarr", folder=tmp_path).archive_decode_rows_per_second
    assert rate is not None
    assert rate > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare.zarr", "full.zarr"]


def test_a_missing_folder_is_an_error_in_one_line(tmp_path: Path):
    with pytest.raises(Refused, match="cannot read") as error:
        examine(folder=tmp_path / "missing")
    assert "\n" not in str(error.value)
