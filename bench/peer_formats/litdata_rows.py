"""litdata: chunks of serialised samples and an index, one folder per view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peer_formats.base import BATCH, Batch, Rows, Values, Written
from peer_formats.stored import FULL, dense_full, full


@dataclass(frozen=True)
class LitdataRows:
    name: str = "litdata"
    stores: str = FULL
    note: str = "chunks of 64 MB; its loader without workers; a random batch is read in rising order and reordered"
    needs: str = "litdata"

    def write(self, folder: Path, rows: Rows) -> Written:
        from litdata.streaming.writer import BinaryWriter  # what litdata.optimize runs in a process of its own

        for view in range(rows.views):
            writer = BinaryWriter(str(folder / f"view-{view:04d}"), chunk_bytes="64MB")
            for image, row in enumerate(full(rows.logits[view])):
                writer.add_item(image, {"image": image, "logits": row})
            writer.done()
            writer.merge(1)
        return Written()

    def open(self, folder: Path) -> LitdataReader:
        return LitdataReader(sorted(folder.glob("view-*")))

    def dense(self, values: Values, classes: int) -> np.ndarray:  # noqa: ARG002
        return dense_full(values)


class LitdataReader:
    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self._open: dict[int, Any] = {}
        self._view(0)

    def _view(self, view: int) -> Any:  # noqa: ANN401  the package has no types
        from litdata import StreamingDataset

        if view not in self._open:
            self._open[view] = StreamingDataset(str(self._folders[view]), shuffle=False)
        return self._open[view]

    def epochs(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        from litdata import StreamingDataLoader, StreamingDataset

        for view, folder in enumerate(self._folders):
            seed = 0 if shuffle is None else int(shuffle.integers(1 << 31))
            samples = StreamingDataset(str(folder), shuffle=shuffle is not None, seed=seed)
            for found in StreamingDataLoader(samples, batch_size=BATCH, num_workers=0, collate_fn=list):
                yield view, np.array([one["image"] for one in found]), collated(found)

    def batch(self, view: int, images: np.ndarray) -> Values:
        samples = self._view(view)
        order = np.argsort(images)  # every jump decodes a window of samples: twenty times as slow as they come
        rows = collated([samples[image] for image in images[order].tolist()])["logits"]
        return {"logits": rows[np.argsort(order)]}

    def close(self) -> None:
        self._open.clear()


def collated(samples: list[dict[str, Any]]) -> Values:
    return {"logits": np.stack([one["logits"] for one in samples])}
