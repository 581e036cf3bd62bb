"""`evaluate`: a student's weights on held-out images, with and without its teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
from redistill_cache.errors import Refused, UsageError

from redistill.evaluate import evaluate
from redistill.models import open_model
from redistill.models.weights import save_weights
from tests.counted_source import CountedSource
from tests.small_archive import DATA, TEACHER, cache


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("archive") / "a.redistill.zarr", views=1, recipe="center")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's own weights, as a student."""
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    model = open_model(TEACHER)
    save_weights(model.module, path, model.metadata())
    return path


def test_images_are_read_once_for_the_index_and_once_for_their_pixels(weights: Path):
    source = CountedSource(DATA)
    result = evaluate(weights, source, size=32, workers=0)
    assert result.metrics.rows == len(source)
    assert result.metrics.teacher is None
    assert source.reads == 2 * len(source)


def test_the_teachers_own_weights_agree_with_the_archive_within_its_fidelity(weights: Path, archive: Path):
    source = CountedSource(DATA)
    result = evaluate(weights, source, archive=archive, workers=0)
    assert result.metrics.teacher is not None
    assert result.metrics.teacher.kl_t1 < 1e-5
    assert source.reads < 2.5 * len(source), "indexed once, rendered once, and the canaries"


def test_mismatched_inputs_are_refused(weights: Path, archive: Path, tmp_path: Path):
    with pytest.raises(Refused, match="does not exist"):
        evaluate(tmp_path / "nothing", DATA)
    with pytest.raises(UsageError, match="both name weights"):
        evaluate(weights, DATA, student="demo:small?weights=other.pt")
    with pytest.raises(Refused, match="the data has 6 classes, the student 8"):
        evaluate(weights, "synthetic?n=20&classes=6", size=32, workers=0)
    with pytest.raises(Refused, match="expected the images the archive was made from"):
        evaluate(weights, "synthetic?n=150&classes=8&seed=9", archive=archive, workers=0)
