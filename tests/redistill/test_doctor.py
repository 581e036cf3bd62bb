"""doctor: the images it reads, the archives it measures, and its errors."""

from __future__ import annotations

import errno
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from redistill_cache.errors import Refused

from redistill import doctor
from redistill.doctor import balance, commits_by, examine, open_views, paced, try_file_system
from tests import tiny_archive
from tests.faults.no_links import NoLinks


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


def test_what_limits_a_stage_on_a_cpu_where_all_share_the_cores():
    options = {"cores": 4, "workers": 4, "shared": True, "apart": {}}
    stage = balance({"loader": 5.0, "teacher": 50.0, "encoder": 1000.0}, **options)
    assert stage.limit == "loader"
    assert stage.images_per_second == pytest.approx(1 / (1 / 20 + 1 / 50 + 1 / 1000))
    assert stage.workers == 3  # of 4 cores, 50 ms of 71 are rendering
    assert stage.rates == {"loader": 20.0, "teacher": 50.0, "encoder": 1000.0}
    stage = balance({"loader": 100.0, "teacher": 50.0, "encoder": 1000.0}, **options)
    assert (stage.limit, stage.workers) == ("teacher", 1)


def test_what_limits_a_stage_on_a_gpu_that_others_feed():
    rates = {"loader": 100.0, "teacher": 3000.0, "encoder": 6000.0}
    stage = balance(rates, cores=8, workers=8, shared=False, apart={})
    assert (stage.limit, stage.images_per_second, stage.workers) == ("loader", 800.0, 20)
    stage = balance(rates, cores=32, workers=32, shared=False, apart={})
    assert (stage.limit, stage.workers) == ("teacher", 20)
    assert stage.images_per_second == pytest.approx(2000.0)
    stage = balance(rates, cores=32, workers=32, shared=False, apart={"disk": 500.0})
    assert (stage.limit, stage.images_per_second) == ("disk", 500.0)


def test_a_slow_network_is_timed_with_a_smaller_batch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "SECONDS_PER_RATE", 0.01)
    monkeypatch.setattr(doctor, "SECONDS_PER_BATCH", 0.05)
    rate, batch = paced(lambda count: time.sleep(0.005 * count), torch.device("cpu"))
    assert doctor.FIRST_BATCH <= batch <= 10
    assert rate <= 200
    monkeypatch.setattr(doctor, "SECONDS_PER_BATCH", 3600.0)  # whatever interrupts the process, this is faster
    assert paced(lambda _: None, torch.device("cpu"))[1] == doctor.BATCH


def test_both_stages_of_a_teacher_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "SECONDS_PER_RATE", 0.01)
    tiny_archive.make(tmp_path / "full.zarr")
    spec, student = "demo:small?num_classes=30&weights=random", "demo:tiny"
    found = examine(folder=tmp_path, archive=tmp_path / "full.zarr", teacher=spec, student=student)
    assert (found.teacher, found.student) == (spec, student)
    assert found.stage1 is not None
    assert found.stage1.rates.keys() == {"loader", "teacher", "encoder", "disk"}
    assert found.stage2 is not None
    assert found.stage2.rates.keys() == {"loader", "student", "decoding", "disk"}
    for stage in (found.stage1, found.stage2):
        assert 0 < stage.images_per_second <= min(stage.rates.values())
        assert stage.limit in stage.rates
        assert stage.workers >= 1
    assert found.encoded_bytes_per_row is not None
    assert 1 < found.encoded_bytes_per_row < 120
    without = examine(folder=tmp_path)
    assert without.stage1 is None
    assert without.stage2 is not None
    with pytest.raises(Refused, match="has no weights"):
        examine(folder=tmp_path, teacher="demo:small?num_classes=30")


class Fat(NoLinks):
    """A disk like those that have neither links nor durable folders."""

    def sync_directory(self, path: Path) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))


def test_what_a_file_system_can_do_is_tried(tmp_path: Path):
    tried = try_file_system(tmp_path)
    assert set(tried.values()) == {None}
    assert commits_by(tried) == "hard links"
    tried = try_file_system(tmp_path, Fat())
    lacking = {"hard links": "Operation not permitted", "fsync of a folder": "Invalid argument"}
    assert {name: problem for name, problem in tried.items() if problem} == lacking
    assert commits_by(tried) == "exclusive rename"
    tried = try_file_system(tmp_path, Fat(renames=False))
    assert commits_by(tried) is None
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_error_in_one_line(tmp_path: Path):
    with pytest.raises(Refused, match="cannot read") as error:
        examine(folder=tmp_path / "missing")
    assert "\n" not in str(error.value)


def test_a_small_shm_is_reported_for_loaders_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "SECONDS_PER_RATE", 0.01)
    needed = doctor.default_workers() * 2 * 128 * 3 * 224**2 / 2**30
    diagnosis = examine(folder=tmp_path)
    for free, expected in ((needed * 0.9, True), (needed * 1.1, False), (None, False)):
        diagnosis.shm_free_gib, diagnosis.advice = free, []
        doctor.add_advice(diagnosis)
        assert any("--shm-size" in advice for advice in diagnosis.advice) == expected


def test_few_open_files_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "SECONDS_PER_RATE", 0.01)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 10, hard))
    try:
        diagnosis = examine(folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert any("raise ulimit -n" in advice for advice in diagnosis.advice)
