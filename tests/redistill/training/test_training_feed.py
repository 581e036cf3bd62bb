"""Batches: every row once an epoch, and the same global batches for any number of ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from redistill.training.feed import epoch_batches, rank_rows, views_of_epoch
from redistill.views.stream_order import epoch_order


def batches_of(seed: int, epoch: int, rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return epoch_batches(epoch_order(seed, epoch, rows, None, rows).rows, batch_size)


@given(
    seed=st.integers(0, 2**63), epoch=st.integers(0, 10_000), count=st.integers(1, 3000), batch_size=st.integers(1, 700)
)
def test_an_epoch_has_each_row_once_in_batches_of_equal_size(seed: int, epoch: int, count: int, batch_size: int):
    batches = batches_of(seed, epoch, np.arange(count), batch_size)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(count))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert len(batches) == -(-count // batch_size)


@given(count=st.integers(1, 300), world_size=st.integers(1, 9))
def test_ranks_split_a_batch_completely_and_evenly(count: int, world_size: int):
    batch = np.random.default_rng(0).permutation(count)
    of_ranks = [rank_rows(batch, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.sort(np.concatenate(of_ranks)), np.arange(count))
    assert max(map(len, of_ranks)) - min(map(len, of_ranks)) <= 1


def test_the_order_depends_on_seed_and_epoch_alone():
    rows = np.arange(1000)
    order = np.concatenate(batches_of(1, 2, rows, 64))
    assert np.array_equal(order, np.concatenate(batches_of(1, 2, rows, 64)))
    assert not np.array_equal(order, np.concatenate(batches_of(1, 3, rows, 64)))
    assert not np.array_equal(order, np.concatenate(batches_of(2, 2, rows, 64)))
    assert order[:5].tolist() == [754, 741, 655, 568, 718], "released runs are resumed in this order"


def test_epochs_cycle_through_the_views():
    assert [views_of_epoch(e, 3, 1) for e in range(5)] == [(0,), (1,), (2,), (0,), (1,)]
    assert [views_of_epoch(e, 3, 2) for e in range(3)] == [(0, 1), (2, 0), (1, 2)]
