"""SRe2L: one folder per epoch, one file per batch, `torch.save` of [coords, flip, mix_index, lam, bbox, logits].

Which images a batch is of is not stored: it follows from the seed of the sampler. Nothing but these batches can be
trained on; the most one can shuffle is their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from peer_formats.base import BATCH, Batch, Rows, Values, Written
from peer_formats.stored import FULL, dense_full, full

SEED = 42


def sampled(images: int, view: int) -> np.ndarray:
    """The order of the images of an epoch, recomputed from the seed."""
    return np.random.default_rng([SEED, view]).permutation(images)


@dataclass(frozen=True)
class BatchFiles:
    name: str = "tensors a batch (SRe2L)"
    stores: str = f"{FULL}, crop, flip"
    note: str = "shuffles whole batches only; a random batch touches every file of the epoch"
    needs: str = ""

    def write(self, folder: Path, rows: Rows) -> Written:
        for view in range(rows.views):
            order = sampled(rows.images, view)
            epoch = folder / f"epoch_{view}"
            epoch.mkdir()
            for number, start in enumerate(range(0, rows.images, BATCH)):
                images = order[start : start + BATCH]
                coords, flip = torch.zeros(len(images), 4), torch.zeros(len(images), dtype=torch.bool)
                logits = torch.from_numpy(full(rows.logits[view, images]))
                torch.save([coords, flip, None, None, None, logits], epoch / f"batch_{number}.tar")
        return Written()

    def open(self, folder: Path) -> BatchReader:
        return BatchReader(folder)

    def dense(self, values: Values, classes: int) -> np.ndarray:  # noqa: ARG002
        return dense_full(values)


class BatchReader:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._views = len(list(folder.glob("epoch_*")))
        self._files = len(list(folder.glob("epoch_0/batch_*.tar")))
        self._images = (self._files - 1) * BATCH + len(self._load(0, self._files - 1))

    def _load(self, view: int, number: int) -> np.ndarray:
        stored = torch.load(self._folder / f"epoch_{view}" / f"batch_{number}.tar", weights_only=True)
        return np.asarray(stored[5].numpy())

    def epochs(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        for view in range(self._views):
            order = sampled(self._images, view)
            numbers = np.arange(self._files) if shuffle is None else shuffle.permutation(self._files)
            for number in numbers.tolist():
                yield view, order[number * BATCH : (number + 1) * BATCH], {"logits": self._load(view, number)}

    def batch(self, view: int, images: np.ndarray) -> Values:
        places = np.argsort(sampled(self._images, view))[images]
        files = {number: self._load(view, number) for number in set((places // BATCH).tolist())}
        return {"logits": np.stack([files[place // BATCH][place % BATCH] for place in places.tolist()])}

    def close(self) -> None:
        pass
