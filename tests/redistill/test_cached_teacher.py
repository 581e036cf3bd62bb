"""The teacher of a training loop: rows of one view, and batches that mix views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from redistill_cache import open_archive
from redistill_cache.errors import OutOfRange, UsageError

import redistill
from tests import tiny_archive
from tests.small_archive import cache

STORED = np.stack([tiny_archive.stored_logits(view) for view in range(3)])
ROWS = np.array([7, 49, 7, 0, 12, 31])
VIEWS = np.array([2, 0, 1, 1, 2, 2])


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory):
    path: Path = tmp_path_factory.mktemp("teacher") / "a.redistill.zarr"
    tiny_archive.make(path)
    return open_archive(path)


def test_the_rows_of_one_view(archive):
    teacher = redistill.CachedTeacher(archive)
    for view in (0, 1, np.int64(2), torch.tensor(0), torch.full((6,), 1)):
        number = int(np.max(np.asarray(view)))
        assert np.array_equal(teacher(torch.from_numpy(ROWS), view).numpy(), STORED[number, ROWS])


@pytest.mark.parametrize("memory_gib", [4.0, 0.0])  # all views stay in memory, or one
def test_a_batch_may_mix_views(archive, memory_gib: float):
    teacher = redistill.CachedTeacher(archive, memory_gib=memory_gib)
    for rows, views in ((ROWS, VIEWS), (torch.from_numpy(ROWS), torch.from_numpy(VIEWS)), (list(ROWS), list(VIEWS))):
        assert np.array_equal(teacher(rows, views).numpy(), STORED[VIEWS, ROWS])
    features = teacher.features(ROWS, VIEWS, "layer4.1")
    expected = np.stack([tiny_archive.features(view)[row] for view, row in zip(VIEWS.tolist(), ROWS, strict=True)])
    assert np.array_equal(features.numpy(), expected)
    assert np.array_equal(teacher(ROWS, 1).numpy(), STORED[1, ROWS])


def test_views_that_batches_mix_are_loaded_once(archive, monkeypatch: pytest.MonkeyPatch):
    loaded, load_view = [], archive.load_view
    monkeypatch.setattr(archive, "load_view", lambda view, *args: loaded.append(view) or load_view(view, *args))
    teacher = redistill.CachedTeacher(archive)
    for _ in range(3):
        teacher(ROWS, VIEWS)
    assert sorted(loaded) == [0, 1, 2]


def test_no_rows(archive):
    assert redistill.CachedTeacher(archive)([], 0).shape == (0, tiny_archive.CLASSES)


@pytest.mark.parametrize(
    ("rows", "views", "error", "message"),
    [
        ([0, 50], 0, OutOfRange, r"rows in \[0, 50\), found 0 to 50"),
        ([0, 1], [0, 3], OutOfRange, r"views in \[0, 3\), found 0 to 3"),
        ([0], -1, OutOfRange, r"views in \[0, 3\)"),
        ([0, 1, 2], [0, 1], UsageError, r"the shapes \[3\] and \[2\]"),
        (5, 0, UsageError, "expected a list of rows"),
        ([0.5], 0, UsageError, "integers, found float64"),
    ],
)
def test_what_is_no_row_or_view_is_refused(archive, rows, views, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        redistill.CachedTeacher(archive)(rows, views)


def test_a_teacher_of_features_alone_and_features_that_were_added(tmp_path: Path):
    path = tmp_path / "a.redistill.zarr"
    teacher = "demo:small?num_classes=8&weights=random"
    cache(path, teacher=teacher, views=2, signals=("penultimate",))
    cache(path, teacher=teacher, views=2, signals=("layer2",))
    archive = open_archive(path)
    cached = redistill.CachedTeacher(archive)
    for layer, width in (("penultimate", 64), ("layer2", 32)):
        rows = cached.features(ROWS, VIEWS % 2, layer)
        assert rows.shape == (6, width)
        expected = [archive.features(view, [row], layer=layer)[0] for row, view in zip(ROWS, VIEWS % 2, strict=True)]
        np.testing.assert_allclose(rows.numpy(), np.stack(expected), atol=1e-6)
    with pytest.raises(OutOfRange, match="no signal 'logits'"):
        cached(ROWS, 0)
    with pytest.raises(OutOfRange, match=r"expected views in \[0, 2\)"):
        cached.features(ROWS, 2, "layer2")
