"""The synthetic image set: bit for bit a function of its options, balanced, with similar classes within a family."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
from redistill_cache.errors import UsageError

from redistill import open_source
from redistill.sources.index import index_source


def pixels(text: str, rows=None) -> np.ndarray:
    source = open_source(text)
    return np.stack([source.sample(i).payload for i in (range(len(source)) if rows is None else rows)])


def test_the_pixels_never_change():
    """Archives of this source are shared: a changed bit is a changed image."""
    digest = hashlib.sha256(pixels("synthetic?n=40").tobytes()).hexdigest()
    assert digest == "fda36f067a625c801920620cc0f7ce3e9358d94824498d3dc3d3e45c7f6cf53e"


def test_order_process_and_length_do_not_matter():
    source = open_source("synthetic?n=300")
    backwards = np.stack([source.sample(i).payload for i in reversed(range(100, 140))])[::-1]
    fresh = pickle.loads(pickle.dumps(source))
    assert np.array_equal(backwards, pixels("synthetic?n=140", range(100, 140)))
    assert np.array_equal(fresh.sample(123).payload, source.sample(123).payload)


def test_splits_and_seeds_are_other_images_of_the_same_classes():
    base = pixels("synthetic?n=20")
    for other in ("synthetic?n=20&split=val", "synthetic?n=20&seed=1"):
        assert not any(np.array_equal(a, b) for a, b in zip(base, pixels(other), strict=True))
    assert open_source("synthetic?split=val").class_names == open_source("synthetic").class_names


def test_index_keys_labels_and_names():
    index = index_source(open_source("synthetic?n=45&classes=10&split=val"), workers=0)
    assert index.keys[0] == "val/0000000"
    assert np.bincount(index.labels).tolist() == [5] * 5 + [4] * 5
    assert len(np.unique(index.digests, axis=0)) == 45
    assert index.class_names is not None
    assert index.class_names[:5] == ("0a", "0b", "0c", "0d", "1a")


@pytest.mark.parametrize("option", ["classes=7", "size=48", "noise=0", "similarity=0.9", "clutter=0"])
def test_every_option_changes_the_pixels(option: str):
    assert pixels(f"synthetic?n=8&{option}").tobytes() != pixels("synthetic?n=8").tobytes()


def test_members_of_a_family_are_similar():
    """Without noise and clutter, class means within a family are closer to each other than across families."""
    source = pixels("synthetic?n=1600&classes=8&clutter=0&noise=0").astype(np.float32).mean(3)
    centred = np.abs(source - source.mean((1, 2), keepdims=True))
    means = np.stack([centred[label::8].mean(0) for label in range(8)])
    apart = np.linalg.norm((means[:, None] - means[None]).reshape(8, 8, -1), axis=2)
    family = np.arange(8) // 4
    same = (family[:, None] == family[None]) & ~np.eye(8, dtype=bool)
    assert apart[same].mean() < apart[family[:, None] != family[None]].mean()


@pytest.mark.parametrize(
    "text",
    ["synthetic:cats", "synthetic?classes=1", "synthetic?size=8", "synthetic?split=test", "synthetic?colour=red"],
)
def test_invalid_options_are_refused_in_one_line(text: str):
    with pytest.raises(UsageError) as error:
        open_source(text)
    assert "\n" not in str(error.value)
    with pytest.raises(IndexError):
        open_source("synthetic?n=3").sample(3)
