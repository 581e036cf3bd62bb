"""Every row once an epoch, the same global batches whatever the number of processes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from redistill.training.feed import epoch_batches, share_of_rank, views_of_epoch


@given(
    seed=st.integers(0, 2**63), epoch=st.integers(0, 10_000), count=st.integers(1, 3000), batch_size=st.integers(1, 700)
)
def test_each_row_comes_once_and_batches_are_even(seed: int, epoch: int, count: int, batch_size: int):
    batches = epoch_batches(seed, epoch, np.arange(count), batch_size)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(count))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == -(-count // batch_size)


@given(count=st.integers(1, 300), world=st.integers(1, 9))
def test_ranks_share_a_batch_without_rest(count: int, world: int):
    batch = np.random.default_rng(0).permutation(count)
    shares = [share_of_rank(batch, rank, world) for rank in range(world)]
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_order_depends_on_seed_and_epoch_alone():
    rows = np.arange(1000)
    one = np.concatenate(epoch_batches(1, 2, rows, 64))
    assert np.array_equal(one, np.concatenate(epoch_batches(1, 2, rows, 64)))
    assert not np.array_equal(one, np.concatenate(epoch_batches(1, 3, rows, 64)))
    assert not np.array_equal(one, np.concatenate(epoch_batches(2, 2, rows, 64)))
    assert one[:5].tolist() == [754, 741, 655, 568, 718], "the order of archives' runs is part of what is promised"


def test_views_go_round():
    assert [views_of_epoch(e, 3, 1) for e in range(5)] == [(0,), (1,), (2,), (0,), (1,)]
    assert [views_of_epoch(e, 3, 2) for e in range(3)] == [(0, 1), (2, 0), (1, 2)]
