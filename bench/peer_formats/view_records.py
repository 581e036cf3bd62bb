"""TinyViT: one folder per epoch with `rank0-keys.txt`, one key per line, and `rank0-values.bin`, records of one size.

A record is a seed int32, k class numbers int16 and k probabilities float16; no header, no count, no checksum. The
reader makes a dictionary of the keys and fetches record by record, as the data set of TinyViT does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peer_formats.base import Batch, Rows, Values, Written, schedule
from peer_formats.stored import dense_top, top


def key_of(image: int) -> str:
    return f"n{image // 1000:08d}_{image}"


def record_type(k: int) -> np.dtype[np.void]:
    return np.dtype([("seed", "<i4"), ("index", "<i2", (k,)), ("probability", "<f2", (k,))])


@dataclass(frozen=True)
class ViewRecords:
    k: int
    needs: str = ""
    note: str = "keys are looked up in a dictionary a view, built when its epoch begins"

    @property
    def name(self) -> str:
        return f"records top-{self.k} (TinyViT)"

    @property
    def stores(self) -> str:
        return f"top-{self.k} probabilities float16, seed"

    def write(self, folder: Path, rows: Rows) -> Written:
        for view in range(rows.views):
            epoch = folder / f"logits_top{self.k}_epoch{view}"
            epoch.mkdir()
            records = np.zeros(rows.images, record_type(self.k))
            records["index"], records["probability"] = top(rows.logits[view], self.k)
            records.tofile(epoch / "rank0-values.bin")
            (epoch / "rank0-keys.txt").write_text("".join(f"{key_of(image)}\n" for image in range(rows.images)))
        return Written()

    def open(self, folder: Path) -> RecordReader:
        return RecordReader(folder, self.k)

    def dense(self, values: Values, classes: int) -> np.ndarray:
        return dense_top(values, classes)


class RecordReader:
    def __init__(self, folder: Path, k: int) -> None:
        self._folder, self._k, self._type = folder, k, record_type(k)
        self._views = len(list(folder.glob("logits_top*")))
        self._view, self._values = -1, -1
        self._places: dict[str, int] = {}
        self._turn_to(0)

    def _turn_to(self, view: int) -> None:
        if view == self._view:
            return
        self.close()
        epoch = self._folder / f"logits_top{self._k}_epoch{view}"
        keys = (epoch / "rank0-keys.txt").read_text().splitlines()
        self._places = {key: place for place, key in enumerate(keys)}
        self._values = os.open(epoch / "rank0-values.bin", os.O_RDONLY)
        self._view = view

    def epochs(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        for view, images in schedule(self._views, len(self._places), shuffle):
            yield view, images, self.batch(view, images)

    def batch(self, view: int, images: np.ndarray) -> Values:
        self._turn_to(view)
        size = self._type.itemsize
        places = (self._places[key_of(image)] for image in images.tolist())
        found = np.frombuffer(b"".join(os.pread(self._values, size, place * size) for place in places), self._type)
        return {"index": found["index"], "probability": found["probability"]}

    def close(self) -> None:
        if self._values >= 0:
            os.close(self._values)
        self._view, self._values = -1, -1
