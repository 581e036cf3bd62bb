"""MosaicML streaming: shards of samples (MDS) and an index, one folder per view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peer_formats.base import BATCH, Batch, Rows, Values, Written, stacked
from peer_formats.stored import FULL, dense_full, full


@dataclass(frozen=True)
class MdsRows:
    name: str = "MosaicML MDS"
    stores: str = FULL
    note: str = "shards of 64 MiB; its data set iterated in this process"
    needs: str = "streaming"

    def write(self, folder: Path, rows: Rows) -> Written:
        from streaming import MDSWriter

        columns = {"image": "int", "logits": f"ndarray:float16:{rows.logits.shape[2]}"}
        for view in range(rows.views):
            with MDSWriter(out=str(folder / f"view-{view:04d}"), columns=columns) as writer:
                for image, row in enumerate(full(rows.logits[view])):
                    writer.write({"image": image, "logits": row})
        return Written()

    def open(self, folder: Path) -> MdsReader:
        return MdsReader(sorted(folder.glob("view-*")))

    def dense(self, values: Values, classes: int) -> np.ndarray:  # noqa: ARG002
        return dense_full(values)


class MdsReader:
    def __init__(self, folders: list[Path]) -> None:
        self._folders = folders
        self._open: dict[tuple[int, bool], Any] = {}
        self._view(0, shuffle=False)

    def _view(self, view: int, shuffle: bool) -> Any:  # noqa: ANN401  the package has no types
        from streaming import StreamingDataset

        if (view, shuffle) not in self._open:
            found = StreamingDataset(local=str(self._folders[view]), shuffle=shuffle, batch_size=BATCH)
            self._open[view, shuffle] = found
        return self._open[view, shuffle]

    def epochs(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        for view in range(len(self._folders)):
            samples = self._view(view, shuffle is not None)
            yield from stacked(view, ((one["image"], one["logits"]) for one in samples))

    def batch(self, view: int, images: np.ndarray) -> Values:
        samples = self._view(view, shuffle=False)
        return {"logits": np.stack([samples[image]["logits"] for image in images.tolist()])}

    def close(self) -> None:
        self._open.clear()
