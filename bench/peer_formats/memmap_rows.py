"""np.memmap of float16, view after view: the limit for any format that stores whole rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peer_formats.base import Batch, Rows, Values, Written, schedule
from peer_formats.stored import FULL, dense_full, full


@dataclass(frozen=True)
class MemmapRows:
    name: str = "np.memmap"
    stores: str = FULL
    note: str = "the limit: no keys, no checks"
    needs: str = ""

    def write(self, folder: Path, rows: Rows) -> Written:
        file = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, rows.logits.shape)
        for view in range(rows.views):
            file[view] = full(rows.logits[view])
        return Written()

    def open(self, folder: Path) -> MemmapReader:
        return MemmapReader(np.load(folder / "rows.npy", mmap_mode="r"))

    def dense(self, values: Values, classes: int) -> np.ndarray:  # noqa: ARG002
        return dense_full(values)


class MemmapReader:
    def __init__(self, mapped: np.ndarray) -> None:
        self._rows = np.asarray(mapped)

    def epochs(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        for view, images in schedule(len(self._rows), len(self._rows[0]), shuffle):
            if shuffle is None:
                yield view, images, {"logits": self._rows[view, images[0] : images[-1] + 1].copy()}
            else:
                yield view, images, self.batch(view, images)

    def batch(self, view: int, images: np.ndarray) -> Values:
        return {"logits": self._rows[view].take(images, axis=0)}

    def close(self) -> None:
        pass
