"""Batches of views, epoch after epoch, from workers that carry pixels and row numbers only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from redistill_cache.errors import Refused
from torch import Tensor

from redistill.loading import BatchLoader
from redistill.views import ViewDataset
from redistill.views.dataset import MixedView, RenderedView

__all__ = ["Feed", "Position", "RenderedRows", "TrainBatch", "epoch_batches", "share_of_rank", "views_of_epoch"]


# -- order ------------------------------------------------------------------------------------------------------------
#
# Which rows make which batch: a function of (seed, epoch) alone, whatever the number of processes.

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


# -- feed -------------------------------------------------------------------------------------------------------------


class RenderedRows(NamedTuple):
    """What comes from a worker."""

    pixels: Tensor  # uint8 [B, 3, size, size]
    labels: Tensor  # int64 [B]
    partner_labels: Tensor | None  # int64 [B], of recipes that mix
    weights: Tensor | None  # float32 [B]


class Position(NamedTuple):
    """Where in the run a batch is."""

    epoch: int
    batch: int
    batches: int
    """Of the epoch."""


@dataclass(frozen=True)
class TrainBatch:
    """This process's share of a global batch."""

    place: Position
    views: tuple[int, ...]
    rows: Rows
    """Of the archive, one per image; with several views per image, item i is of row i // len(views)."""
    global_rows: int
    """Views in the batch over all processes."""
    carried: RenderedRows


def carry(items: list[RenderedView | MixedView]) -> RenderedRows:
    labels = torch.tensor([item.label for item in items])
    pixels = torch.stack([item.pixels for item in items])
    if not isinstance(items[0], MixedView):
        return RenderedRows(pixels, labels, None, None)
    mixed = [item for item in items if isinstance(item, MixedView)]
    partners = torch.tensor([item.partner_label for item in mixed])
    return RenderedRows(pixels, labels, partners, torch.tensor([float(item.weight) for item in mixed]))


@dataclass(frozen=True)
class Feed:
    """The batches of a whole run for one process. Iterating from a place gives what an unbroken run would give."""

    dataset: ViewDataset
    epochs: int
    batch_size: int
    seed: int
    views_per_image: int = 1
    rank: int = 0
    world: int = 1
    workers: int = 0
    pin: bool = False

    def views(self, epoch: int) -> tuple[int, ...]:
        return views_of_epoch(epoch, self.dataset.views.num_views, self.views_per_image)

    def batches(self, epoch: int) -> list[Rows]:
        """The global batches of an epoch, as rows of the archive."""
        usable = reduce(
            np.intersect1d, (self.dataset.indices(view) % self.dataset.num_rows for view in self.views(epoch))
        )
        images = self.batch_size // self.views_per_image
        if len(usable) < self.world:
            raise Refused(f"{len(usable)} rows cannot be shared by {self.world} processes; use fewer")
        found = epoch_batches(self.seed, epoch, usable, images)
        if len(found[-1]) < self.world:
            raise Refused(f"--batch-size {self.batch_size} is too small for {self.world} processes")
        return found

    def start(self, epoch: int = 0, batch: int = 0) -> Iterator[TrainBatch]:
        """Every batch from there to the end. Workers stay from epoch to epoch."""

        def batches_with_indices() -> Iterator[tuple[tuple[Position, tuple[int, ...], Rows, int], list[int]]]:
            for now in range(epoch, self.epochs):
                batches, views = self.batches(now), self.views(now)
                for at in range(batch if now == epoch else 0, len(batches)):
                    rows = share_of_rank(batches[at], self.rank, self.world)
                    batch_tag = Position(now, at, len(batches)), views, rows, len(batches[at]) * len(views)
                    yield batch_tag, [self.dataset.index(view, row) for row in rows.tolist() for view in views]

        loader = BatchLoader(self.dataset, workers=self.workers, collate=carry, pin=self.pin)
        for (place, views, rows, count), carried in loader.load(batches_with_indices()):
            yield TrainBatch(place, views, rows, count, carried)
