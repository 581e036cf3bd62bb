"""HDF5: one data set [views, images, classes], without chunks, which is the fastest to read at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peer_formats.base import Batch, Rows, Values, Written, schedule
from peer_formats.stored import FULL, dense_full, full


@dataclass(frozen=True)
class Hdf5Rows:
    name: str = "HDF5"
    stores: str = FULL
    note: str = "contiguous; rows are read in rising order and reordered, as h5py requires"
    needs: str = "h5py"

    def write(self, folder: Path, rows: Rows) -> Written:
        import h5py

        with h5py.File(folder / "rows.h5", "w") as file:
            logits = file.create_dataset("logits", rows.logits.shape, np.float16)
            for view in range(rows.views):
                logits[view] = full(rows.logits[view])
        return Written()

    def open(self, folder: Path) -> Hdf5Reader:
        import h5py

        return Hdf5Reader(h5py.File(folder / "rows.h5", "r"))

    def dense(self, values: Values, classes: int) -> np.ndarray:  # noqa: ARG002
        return dense_full(values)


class Hdf5Reader:
    def __init__(self, file: Any) -> None:  # noqa: ANN401  the package has no types
        self._file, self._rows = file, file["logits"]

    def epochs(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        for view, images in schedule(self._rows.shape[0], self._rows.shape[1], shuffle):
            if shuffle is None:
                yield view, images, {"logits": self._rows[view, images[0] : images[-1] + 1]}
            else:
                yield view, images, self.batch(view, images)

    def batch(self, view: int, images: np.ndarray) -> Values:
        order = np.argsort(images)
        rows = np.empty((len(images), self._rows.shape[2]), np.float16)
        rows[order] = self._rows[view, images[order]]
        return {"logits": rows}

    def close(self) -> None:
        self._file.close()
