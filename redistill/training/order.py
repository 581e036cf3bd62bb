"""Which rows make which batch: a function of (seed, epoch) alone, whatever the number of processes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["epoch_batches", "share_of_rank", "views_of_epoch"]

Rows = npt.NDArray[np.int64]


def epoch_batches(seed: int, epoch: int, rows: Rows, batch_size: int) -> list[Rows]:
    """The rows of one epoch in random order, each once, in as few batches of at most `batch_size` as it takes.

    Batches differ by one row at most, so the last one is no smaller than the others: batch norms need neighbours.
    """
    shuffled = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(rows)
    return np.array_split(shuffled, max(1, -(-len(rows) // batch_size)))


def share_of_rank(batch: Rows, rank: int, world: int) -> Rows:
    """The rows of a global batch that one of `world` processes computes."""
    return batch[rank::world]


def views_of_epoch(epoch: int, num_views: int, views_per_image: int) -> tuple[int, ...]:
    """The views an epoch shows of every image."""
    return tuple((epoch * views_per_image + j) % num_views for j in range(views_per_image))
