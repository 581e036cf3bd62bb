"""The views of an archive from a reader's images: joined, compared with the canaries, rendered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from redistill_cache import open_archive
from redistill_cache.errors import Refused

from redistill.views import ViewDataset
from redistill.views.aligned import aligned_views
from tests.counted_source import CountedSource
from tests.small_archive import DATA, cache, without_canaries


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("aligned") / "a.redistill.zarr", views=2)


def test_the_dataset_renders_the_archives_views_and_passes_the_check(path: Path):
    archive = open_archive(path)
    views = aligned_views(DATA, archive, size=16)
    assert views.joined.exact
    assert views.alignment.require().verdict == "exact"
    expected = ViewDataset(DATA, archive, size=16)
    assert torch.equal(views.dataset[200].pixels, expected[200].pixels)


def test_images_are_indexed_once(path: Path):
    source, archive = CountedSource(DATA), open_archive(path)
    views = aligned_views(source, archive, workers=0)
    assert source.reads == len(source) + views.alignment.checked


def test_missing_images_are_refused_unless_allowed(path: Path):
    fewer = DATA.replace("n=150", "n=120")
    with pytest.raises(Refused, match="30 missing"):
        aligned_views(fewer, open_archive(path))
    views = aligned_views(fewer, open_archive(path), allow_missing=True)
    assert len(views.dataset.indices(0)) == 120


def test_an_archive_without_canaries_cannot_be_compared(path: Path, tmp_path: Path):
    archive = open_archive(without_canaries(path, tmp_path / "a.redistill.zarr"))
    alignment = aligned_views(DATA, archive).alignment
    assert (alignment.verdict, alignment.checked) == ("no canaries", 0)
    assert alignment.to_json()["verdict"] == "no canaries"
    with pytest.raises(Refused, match="the archive has no canaries"):
        alignment.require()
