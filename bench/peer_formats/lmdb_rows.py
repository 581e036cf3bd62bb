"""LMDB: one entry per row, keyed by the numbers of view and image."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peer_formats.base import Batch, Rows, Values, Written, schedule
from peer_formats.stored import FULL, dense_full, full

KEY = struct.Struct(">HI")  # big endian, so that entries lie in the order of views and images
SHAPE = b"shape"


@dataclass(frozen=True)
class LmdbRows:
    name: str = "LMDB"
    stores: str = FULL
    note: str = "one entry per row; pages of 4 KiB"
    needs: str = "lmdb"

    def write(self, folder: Path, rows: Rows) -> Written:
        import lmdb

        room = 4 * rows.logits.nbytes + (64 << 20)  # of addresses, not of disk
        with lmdb.open(str(folder), map_size=room) as database:
            for view in range(rows.views):
                with database.begin(write=True) as transaction:
                    for image, row in enumerate(full(rows.logits[view])):
                        transaction.put(KEY.pack(view, image), row.tobytes(), append=True)
            with database.begin(write=True) as transaction:
                transaction.put(SHAPE, struct.pack(">HI", rows.views, rows.images))
        return Written()

    def open(self, folder: Path) -> LmdbReader:
        import lmdb

        return LmdbReader(lmdb.open(str(folder), readonly=True, lock=False, readahead=False))

    def dense(self, values: Values, classes: int) -> np.ndarray:  # noqa: ARG002
        return dense_full(values)


class LmdbReader:
    def __init__(self, database: Any) -> None:  # noqa: ANN401  the package has no types
        self._database = database
        self._transaction = database.begin(buffers=True)
        self._views, self._images = struct.unpack(">HI", self._transaction.get(SHAPE))

    def epochs(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        if shuffle is not None:
            for view, images in schedule(self._views, self._images, shuffle):
                yield view, images, self.batch(view, images)
            return
        with self._transaction.cursor() as cursor:
            cursor.first()
            entries = cursor.iternext(keys=False)
            for view, images in schedule(self._views, self._images, None):
                yield view, images, joined([next(entries) for _ in images])

    def batch(self, view: int, images: np.ndarray) -> Values:
        return joined([self._transaction.get(KEY.pack(view, image)) for image in images.tolist()])

    def close(self) -> None:
        self._transaction.abort()
        self._database.close()


def joined(rows: list[memoryview]) -> Values:
    return {"logits": np.frombuffer(b"".join(rows), np.float16).reshape(len(rows), -1)}
