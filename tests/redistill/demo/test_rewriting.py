"""Archives rewritten with other logits: everything else stays the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import redistill_cache

from redistill.demo.rewriting import mislead, rewrite_logits
from tests import tiny_archive


@pytest.fixture
def archive(tmp_path: Path) -> redistill_cache.Archive:
    tiny_archive.make(tmp_path / "tiny.redistill.zarr")
    return redistill_cache.open_archive(tmp_path / "tiny.redistill.zarr")


def test_samples_views_and_canaries_are_copied(archive, tmp_path: Path):
    identity = rewrite_logits(archive, tmp_path / "copy.redistill.zarr", codec="float32")
    copy = redistill_cache.open_archive(tmp_path / "copy.redistill.zarr")
    assert copy.id == identity != archive.id
    assert list(copy.keys) == list(archive.keys)
    assert np.array_equal(copy.labels, archive.labels)
    assert np.array_equal(copy.digests, archive.digests)
    assert copy.teacher().model["derived_from"] == archive.id
    for view in range(archive.num_views):
        assert np.array_equal(copy.logits(view), archive.logits(view))
        original, copied = archive.view_params(view), copy.view_params(view)
        assert all(np.array_equal(original[name], copied[name]) for name in original)
        assert all(np.array_equal(a, b) for a, b in zip(archive.canaries(view), copy.canaries(view), strict=True))


def test_topk_stores_the_largest_logits(archive, tmp_path: Path):
    rewrite_logits(archive, tmp_path / "top.redistill.zarr", codec="topk", k=2)
    copy = redistill_cache.open_archive(tmp_path / "top.redistill.zarr")
    assert not copy.codec().full_rows
    assert np.array_equal(copy.logits(1).argmax(1), archive.logits(1).argmax(1))


def test_a_misled_teacher_is_confidently_wrong_on_the_requested_share_of_views():
    logits = np.random.default_rng(0).normal(0, 3, (4000, 7)).astype(np.float32)
    rows = np.arange(4000)
    misled = mislead(0.2, seed=3)(logits, 1, rows)
    changed = (misled != logits).any(1)
    assert 0.17 < changed.mean() < 0.23
    assert np.array_equal(np.sort(misled, 1), np.sort(logits, 1)), "logits are only swapped"
    assert (misled[changed].argmax(1) != logits[changed].argmax(1)).all()
    assert np.array_equal(misled[50:60], mislead(0.2, seed=3)(logits[50:60], 1, rows[50:60])), (
        "independent of the order of rows"
    )
    other_view = mislead(0.2, seed=3)(logits, 2, rows)
    assert not np.array_equal(misled, other_view)
    wrong = misled[changed].argmax(1)
    assert np.bincount(wrong, minlength=7).min() > 0.5 * changed.sum() / 7, (
        "every class is wrongly predicted for some row"
    )
