"""The whole demo at a small size: every loss is in the summary and on the page, and a second call repeats nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from redistill_cache import open_archive

from redistill.demo import run as demo
from redistill.progress import NoProgress


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STUDENT_DATA", f"synthetic?{demo.DIFFICULTY}&n=60")
    monkeypatch.setattr(demo, "VAL_DATA", f"synthetic?{demo.DIFFICULTY}&n=40&split=val")
    monkeypatch.setattr(demo, "OPTIM", replace(demo.OPTIM, epochs=2))
    monkeypatch.setattr(demo, "FEATURES_OPTIM", replace(demo.FEATURES_OPTIM, epochs=2))
    monkeypatch.setattr(demo, "SEEDS", (0, 1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("small")
def test_the_demo(tmp_path: Path):
    summary = demo.run_demo(tmp_path / "demo", NoProgress())
    stored = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert stored == json.loads(json.dumps(summary.to_json()))
    assert list(stored["students"]) == ["ce", "kl", "power", "features"]
    assert list(stored["students_of_misled_teacher"]) == ["ce", "kl", "power"]
    for accuracy in stored["students"].values():
        assert accuracy["n"] == 2
        assert 0 <= accuracy["top1_mean"] <= 1
    assert 0 < stored["bytes_per_view"]["features"] < 4 * (32 + 64 + 128)
    assert open_archive(tmp_path / "demo" / demo.ARCHIVE).num_views == demo.VIEWS
    config = (tmp_path / "demo" / demo.FEATURES_RUNS / "features-0" / "config.toml").read_text()
    assert 'opt = "adamw"' in config
    assert "pairs=" in config
    page = (tmp_path / "demo" / "report.html").read_text()
    for name in stored["students"]:
        assert f"{name}-0" in page
    checkpoints = tmp_path / "demo" / demo.FEATURES_RUNS / "last.ckpt"
    before = checkpoints.stat().st_mtime_ns
    again = demo.run_demo(tmp_path / "demo", NoProgress())
    assert again.students == summary.students
    assert checkpoints.stat().st_mtime_ns == before
