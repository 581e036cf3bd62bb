"""Batches of views, epoch after epoch, from workers that carry pixels and row numbers only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from redistill_cache.errors import Refused
from torch import Tensor

from redistill.loading import batch_loader
from redistill.training.order import Rows, epoch_batches, share_of_rank, views_of_epoch
from redistill.views import ViewDataset
from redistill.views.dataset import MixedView, RenderedView

__all__ = ["Batch", "Carried", "Feed", "Place"]


class Carried(NamedTuple):
    """What comes from a worker."""

    pixels: Tensor  # uint8 [B, 3, size, size]
    labels: Tensor  # int64 [B]
    partner_labels: Tensor | None  # int64 [B], of recipes that mix
    weights: Tensor | None  # float32 [B]


class Place(NamedTuple):
    """Where in the run a batch is."""

    epoch: int
    batch: int
    batches: int
    """Of the epoch."""


@dataclass(frozen=True)
class Batch:
    """This process's share of a global batch."""

    place: Place
    views: tuple[int, ...]
    rows: Rows
    """Of the archive, one per image; with several views per image, item i is of row i // len(views)."""
    global_rows: int
    """Views in the batch over all processes."""
    carried: Carried


def carry(items: list[RenderedView | MixedView]) -> Carried:
    labels = torch.tensor([item.label for item in items])
    pixels = torch.stack([item.pixels for item in items])
    if not isinstance(items[0], MixedView):
        return Carried(pixels, labels, None, None)
    mixed = [item for item in items if isinstance(item, MixedView)]
    partners = torch.tensor([item.partner_label for item in mixed])
    return Carried(pixels, labels, partners, torch.tensor([float(item.weight) for item in mixed]))


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

    def start(self, epoch: int = 0, batch: int = 0) -> Iterator[Batch]:
        """Every batch from there to the end. Workers stay from epoch to epoch."""
        waiting: deque[tuple[Place, tuple[int, ...], Rows, int]] = deque()

        def indices() -> Iterator[list[int]]:
            for now in range(epoch, self.epochs):
                batches, views = self.batches(now), self.views(now)
                for at in range(batch if now == epoch else 0, len(batches)):
                    rows = share_of_rank(batches[at], self.rank, self.world)
                    waiting.append((Place(now, at, len(batches)), views, rows, len(batches[at]) * len(views)))
                    yield [self.dataset.index(view, row) for row in rows.tolist() for view in views]

        loader = batch_loader(self.dataset, indices(), workers=self.workers, collate=carry, pin=self.pin)
        for carried in loader:
            place, views, rows, count = waiting.popleft()
            yield Batch(place, views, rows, count, carried)
