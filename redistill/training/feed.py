"""Batches of rendered views, epoch after epoch. Workers return pixels and labels; teacher logits stay in the trainer.

Which rows form which batch depends on (seed, epoch) alone, for any number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from redistill_cache.errors import Refused
from torch import Tensor

from redistill.loading import BatchLoader
from redistill.sources.stream import TarsAhead
from redistill.training.archive_use import ViewStream
from redistill.views import ViewDataset
from redistill.views.dataset import MixedView, RenderedView
from redistill.views.stream_order import EpochOrder, epoch_order

__all__ = [
    "BatchPlan",
    "Feed",
    "TrainBatch",
    "ViewBatch",
    "collate_views",
    "epoch_batches",
    "rank_rows",
    "views_of_epoch",
]

Rows = npt.NDArray[np.int64]
CPU = torch.device("cpu")


class BatchPlan(NamedTuple):
    """A global batch and the rows of it that this rank computes."""

    epoch: int
    batch: int
    batches: int
    """In the epoch."""
    views: tuple[int, ...]
    rows: Rows
    """Of the archive, one per image; with several views per image, item i is of row i // len(views)."""
    global_size: int
    """Views in the batch over all ranks."""

    @property
    def last(self) -> bool:
        """Whether the batch ends its epoch."""
        return self.batch + 1 == self.batches


class ViewBatch(NamedTuple):
    """Rendered views, collated by a worker."""

    pixels: Tensor  # uint8 [B, 3, size, size]
    labels: Tensor  # int64 [B]
    partner_labels: Tensor | None  # int64 [B], of recipes that mix
    mix_weights: Tensor | None  # float32 [B]


class TrainBatch(NamedTuple):
    plan: BatchPlan
    images: ViewBatch
    """On the device."""


@dataclass(frozen=True)
class Feed:
    """The batches of a whole run for one rank. Started in the middle, it gives the same batches as a whole run."""

    dataset: ViewDataset
    epochs: int
    batch_size: int
    seed: int
    views_per_image: int = 1
    num_views: int | None = None
    """The first views, which are used in turn; all of the dataset if None."""
    rank: int = 0
    world_size: int = 1
    workers: int = 0
    device: torch.device = CPU
    stream: ViewStream | None = None
    """Of an archive whose views are fetched meanwhile."""

    def views(self, epoch: int) -> tuple[int, ...]:
        num_views = self.dataset.views.num_views if self.num_views is None else self.num_views
        return views_of_epoch(epoch, num_views, self.views_per_image)

    def usable(self, epoch: int) -> Rows:
        """The rows that can be rendered in an epoch."""
        rows: Rows = reduce(
            np.intersect1d, (self.dataset.indices(view) % self.dataset.num_rows for view in self.views(epoch))
        )
        return rows

    def order(self, epoch: int) -> EpochOrder:
        """All rows of an epoch; of streamed tars, group by group."""
        dataset = self.dataset
        return epoch_order(self.seed, epoch, self.usable(epoch), dataset.source, dataset.views.source_rows)

    def global_batches(self, epoch: int) -> list[Rows]:
        """The batches of an epoch over all ranks, as rows of the archive."""
        usable = self.usable(epoch)
        if len(usable) < self.world_size:
            raise Refused(f"{len(usable)} rows cannot be split over {self.world_size} ranks; use fewer ranks")
        batches = epoch_batches(self.order(epoch).rows, self.batch_size // self.views_per_image)
        if len(batches[-1]) < self.world_size:
            raise Refused(f"--batch-size {self.batch_size} is too small for {self.world_size} ranks")
        return batches

    def start(self, epoch: int = 0, batch: int = 0) -> Generator[TrainBatch, None, None]:
        """Every batch from this one to the end of the run. The workers live for all epochs.

        Batches are planned ahead of use, and none of an epoch whose views are not here: before it, all earlier ones are
        given, and then this waits.
        """
        groups = _Groups(self, epoch, batch)

        def plans(first: int) -> Iterator[tuple[BatchPlan, list[int]]]:
            for current in range(first, self.epochs):
                views = self.views(current)
                if current > first and self.stream is not None and not self.stream.here(views):
                    return
                batches = self.global_batches(current)
                for i in range(batch if current == epoch else 0, len(batches)):
                    rows = rank_rows(batches[i], self.rank, self.world_size)
                    plan = BatchPlan(current, i, len(batches), views, rows, len(batches[i]) * len(views))
                    if ahead.fetches:
                        ahead.expect(groups.number(plan))
                    yield plan, [self.dataset.index(view, row) for row in rows.tolist() for view in views]

        pin = self.device.type == "cuda"
        with (
            BatchLoader(self.dataset, workers=self.workers, collate=collate_views, pin=pin) as loader,
            TarsAhead(self.dataset.source, groups.tars()) as ahead,
        ):
            current = epoch
            while current < self.epochs:
                if self.stream is not None:
                    self.stream.wait(self.views(current))
                for item in on_device(loader.load(plans(current)), self.device):
                    if ahead.fetches:
                        ahead.enter(groups.number(item.plan))
                    current = item.plan.epoch + 1
                    yield item


class _Groups:
    """The groups of tars that the batches from one on use, numbered from 0 in the order of their use."""

    def __init__(self, feed: Feed, epoch: int, batch: int) -> None:
        self.feed, self.epoch, self.batch = feed, epoch, batch
        self._of_epoch: dict[int, _EpochGroups] = {}

    def tars(self) -> Iterator[Sequence[int]]:
        for epoch in range(self.epoch, self.feed.epochs):
            groups = self._groups(epoch)
            for group in groups.order.tars[max(0, -groups.before) :]:
                yield group.tolist()

    def number(self, plan: BatchPlan) -> int:
        """The last group that the batch uses."""
        before, order, images = self._groups(plan.epoch)
        return before + order.group_at(images_before(plan.batch + 1, plan.batches, images) - 1)

    def _groups(self, epoch: int) -> _EpochGroups:
        if epoch not in self._of_epoch:
            order = self.feed.order(epoch)
            images, before = len(order.rows), 0
            if epoch > self.epoch:
                earlier = self._groups(epoch - 1)
                before = earlier.before + len(earlier.order.tars)
            elif self.batch:
                batches = len(self.feed.global_batches(epoch))
                before = -order.group_at(images_before(self.batch, batches, images))
            no_rows = np.zeros(0, np.int64)  # those of all epochs of a run would be gigabytes
            self._of_epoch[epoch] = _EpochGroups(before, order._replace(rows=no_rows), images)
        return self._of_epoch[epoch]


class _EpochGroups(NamedTuple):
    before: int
    """The number of its first group; negative if the run begins after it."""
    order: EpochOrder
    images: int


def images_before(batch: int, batches: int, images: int) -> int:
    """How many of the images of an epoch are in its first batches."""
    return batch * (images // batches) + min(batch, images % batches)


def on_device(batches: Iterator[tuple[BatchPlan, ViewBatch]], device: torch.device) -> Iterator[TrainBatch]:
    """The batches on the device. To a GPU, a stream of its own copies each of them while the step before it runs: that
    step has been queued when the next batch is asked for."""
    if device.type != "cuda":
        for plan, images in batches:
            yield TrainBatch(plan, moved(images, device))
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for plan, images in batches:
        with torch.cuda.stream(copies):
            copied = moved(images, device)
        steps = torch.cuda.current_stream(device)
        steps.wait_stream(copies)
        for tensor in copied:
            if tensor is not None:
                tensor.record_stream(steps)  # its memory belongs to `copies`, which must not reuse it too early
        yield TrainBatch(plan, copied)


def moved(images: ViewBatch, device: torch.device) -> ViewBatch:
    """Pinned tensors are copied to a GPU without a wait."""

    def move(tensor: Tensor | None) -> Any:  # noqa: ANN401  None for None
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return ViewBatch(*map(move, images))


def epoch_batches(rows: Rows, batch_size: int) -> list[Rows]:
    """The rows of one epoch in their order, in as few batches of at most `batch_size` as possible.

    Batch sizes differ by at most one: a small last batch would give batch norms poor statistics.
    """
    return np.array_split(rows, max(1, -(-len(rows) // batch_size)))


def rank_rows(batch: Rows, rank: int, world_size: int) -> Rows:
    """The rows of a global batch that one of `world_size` ranks computes."""
    return batch[rank::world_size]


def views_of_epoch(epoch: int, num_views: int, views_per_image: int) -> tuple[int, ...]:
    """The views of every image that an epoch trains on."""
    return tuple((epoch * views_per_image + j) % num_views for j in range(views_per_image))


def collate_views(items: list[RenderedView | MixedView]) -> ViewBatch:
    labels = torch.tensor([item.label for item in items])
    pixels = torch.stack([item.pixels for item in items])
    if not isinstance(items[0], MixedView):
        return ViewBatch(pixels, labels, None, None)
    mixed = [item for item in items if isinstance(item, MixedView)]
    partners = torch.tensor([item.partner_label for item in mixed])
    return ViewBatch(pixels, labels, partners, torch.tensor([float(item.weight) for item in mixed]))
