"""The estimate of --dry-run compared with the written archive, and the check of free disk space."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from redistill_cache.errors import Refused
from redistill_cache.machine import usable_cores

from redistill.caching import cache_teacher, estimate_cache
from redistill.caching.estimate import estimate
from redistill.caching.pilot import TeacherRunner, fit_codecs, run_pilot
from redistill.caching.plan import make_plan
from redistill.interrupts import StopRequest
from redistill.shares import Share
from tests.stage1 import five_class_options


@pytest.mark.parametrize("changes", [{}, {"codec": "float16"}, {"fidelity": 1e-5, "signals": ("logits", "layer2")}])
def test_the_estimate_is_within_a_tenth(tmp_path: Path, changes: dict):
    options = replace(
        five_class_options(tmp_path / "a.zarr", views=6, data="synthetic?n=400&classes=5", **changes), block_rows=None
    )
    estimate = estimate_cache(options)
    assert not options.out.exists()
    result = cache_teacher(options)
    assert abs(estimate.total_bytes / result.total_bytes - 1) < 0.1, (estimate.total_bytes, result.total_bytes)
    assert abs(estimate.bytes_per_view - result.bytes_per_view) < 0.1 * result.bytes_per_view + 0.5
    assert estimate.blocks == 6


def test_the_time_is_that_of_the_teacher_and_of_encoding(tmp_path: Path):
    options = five_class_options(tmp_path / "a.zarr", views=6, data="synthetic?n=400&classes=5", share="0/2")
    plan = make_plan(options, Share.of(options.share))
    with TeacherRunner(plan, StopRequest()) as runner:
        pilot = run_pilot(runner)
    choices = fit_codecs(plan, pilot)
    [(name, choice)] = choices.items()
    assert 0 < choice.best.cpu_seconds_per_row < 0.1
    slow = {name: replace(choice, best=replace(choice.best, cpu_seconds_per_row=5.0))}
    cost = estimate(plan, pilot, slow)
    teacher, encoding = 2400 / pilot.images_per_second, 2400 * 5.0 / usable_cores()
    assert cost.device_hours * 3600 == pytest.approx(teacher + encoding)
    assert cost.seconds == pytest.approx((teacher + encoding) / 2)
    assert cost.images_per_second == pytest.approx(2400 / cost.seconds)


def test_too_little_disk_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("redistill.caching.estimate.shutil.disk_usage", lambda _: usage)
    with pytest.raises(Refused, match="free"):
        cache_teacher(five_class_options(tmp_path / "a.zarr"))
