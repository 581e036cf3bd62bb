"""The order of a dataset's views in a training loop of one's own, on one process or on several."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from redistill_cache.errors import UsageError

from redistill.views.dataset import ViewDataset
from redistill.views.stream_order import epoch_order

__all__ = ["ViewSampler"]


class ViewSampler(torch.utils.data.Sampler[int]):
    """Every usable row of a `ViewDataset` once per epoch, in random order; epoch e shows view e mod `num_views`.

        sampler = ViewSampler(dataset, seed=0)
        loader = DataLoader(dataset, batch_size=64, sampler=sampler, num_workers=8, persistent_workers=True)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for pixels, labels, rows, views in loader: ...

    The order is a function of seed and epoch. Of `world` processes, each takes every `world`-th row of it, so that for
    the same batch size over all processes any number of them sees the same batches. All get as many rows, since
    DistributedDataParallel waits for the slowest: where the rows cannot be divided, the first ones are shown twice.

    Rank and world are those of the process group, if there is one. A framework that divides the batches itself, as
    Accelerate does, needs `rank=0, world=1`.
    """

    def __init__(
        self,
        dataset: ViewDataset,
        *,
        seed: int = 0,
        epoch: int = 0,
        rank: int | None = None,
        world: int | None = None,
        num_views: int | None = None,
    ) -> None:
        """`num_views` are used in turn, by default all; a teacher may have fewer than its archive (`views_of`)."""
        if (rank is None) != (world is None):
            raise UsageError(f"expected both rank and world or neither, found rank={rank}, world={world}")
        if rank is None or world is None:
            grouped = dist.is_available() and dist.is_initialized()
            rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        if not 0 <= rank < world:
            raise UsageError(f"expected a rank from 0 to world - 1, found rank={rank}, world={world}")
        available = dataset.views.num_views
        if num_views is not None and not 0 < num_views <= available:
            raise UsageError(f"expected num_views from 1 to the {available} of the dataset, found {num_views}")
        self.dataset, self.seed, self.rank, self.world = dataset, seed, rank, world
        self.num_views = available if num_views is None else num_views
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose order and view of the next iterations."""
        if epoch < 0:
            raise UsageError(f"expected an epoch of 0 or above, found {epoch}")
        self.epoch = epoch

    @property
    def view(self) -> int:
        """The view that this epoch shows."""
        return self.epoch % self.num_views

    def __len__(self) -> int:
        return -(-len(self.dataset.indices(self.view)) // self.world)

    def __iter__(self) -> Iterator[int]:
        dataset = self.dataset
        rows = dataset.indices(self.view) % dataset.num_rows
        order = epoch_order(self.seed, self.epoch, rows, dataset.source, dataset.views.source_rows)
        indices = self.view * dataset.num_rows + order.rows
        # np.resize repeats the first indices where the ranks cannot have as many without.
        padded = np.resize(indices, len(self) * self.world)
        return iter(padded[self.rank :: self.world].tolist())
