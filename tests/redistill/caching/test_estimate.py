"""The estimate of --dry-run compared with the written archive, and the check of free disk space."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from redistill_cache.errors import Refused

from redistill.caching import cache_teacher, estimate_cache
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


def test_too_little_disk_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("redistill.caching.estimate.shutil.disk_usage", lambda _: usage)
    with pytest.raises(Refused, match="free"):
        cache_teacher(five_class_options(tmp_path / "a.zarr"))
