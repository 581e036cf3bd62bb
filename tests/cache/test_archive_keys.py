"""Packed keys behave like a list of strings of any length and alphabet; different keys never compare equal."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redistill_cache import keys as packing
from redistill_cache.errors import Damaged
from redistill_cache.keys import PackedKeys, pack_keys

TEXTS = st.lists(st.text(max_size=40), max_size=30)


@given(TEXTS)
@settings(max_examples=80, deadline=None)
def test_packed_keys_equal_the_strings(texts: list[str]):
    keys = pack_keys(texts)
    assert list(keys) == texts
    assert [keys[i] for i in range(-len(texts), len(texts))] == texts * 2
    assert keys == pack_keys(keys) == pickle.loads(pickle.dumps(keys))


@given(TEXTS, st.data())
@settings(max_examples=80, deadline=None)
def test_hashes_and_equality_follow_the_strings(texts: list[str], data: st.DataObject):
    others = data.draw(st.permutations(texts)) + data.draw(TEXTS)
    mine, theirs = pack_keys(texts), pack_keys(others)
    rows, other_rows = np.divmod(np.arange(len(texts) * len(others)), max(len(others), 1))
    truth = [texts[i] == others[j] for i, j in zip(rows, other_rows, strict=True)]
    assert mine.equal_at(rows, theirs, other_rows).tolist() == truth
    assert (mine.hashes()[rows] == theirs.hashes()[other_rows]).tolist() == truth


def test_take_and_slices():
    texts = [f"n{i % 7:03d}/{'x' * (i % 11)}{i}.jpg" for i in range(1000)]
    keys = pack_keys(texts)
    rows = np.random.default_rng(0).permutation(1000)[:300]
    assert list(keys.take(rows)) == [texts[i] for i in rows]
    assert list(keys[10:40:3]) == texts[10:40:3]
    with pytest.raises(IndexError):
        keys[1000]


def test_one_long_key_does_not_allocate_a_large_matrix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "SLICE_BYTES", 4096)
    texts = [*(f"k{i}" for i in range(2000)), "long" * 5000, *(f"k{i}" for i in range(2000))]
    keys = pack_keys(texts)
    hashes = keys.hashes()
    assert len(set(hashes.tolist())) == 2001
    assert keys.equal_at(np.arange(4001), keys, np.arange(4001)).all()
    assert list(keys.take(np.arange(4001)[::-1])) == texts[::-1]


@pytest.mark.parametrize("offsets", [[], [1, 3], [0, 2], [0, 4], [0, 3, 1, 3], [[0, 3]]])
def test_invalid_offsets_are_damage(offsets: list[int]):
    with pytest.raises(Damaged, match="offsets"):
        PackedKeys(np.frombuffer(b"abc", np.uint8), np.array(offsets, np.uint64))
