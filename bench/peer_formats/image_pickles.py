"""FKD: one pickle per image with all of its views, `torch.save` of [coords, flip, labels].

coords float32 [views, 4], flip bool [views], labels float32 [views, 2, k]: class numbers as floats, and probabilities.
FKD publishes 500 views to a file and trains on four of them each time it opens one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from peer_formats.base import BATCH, Batch, Rows, Values, Written
from peer_formats.stored import dense_top, top

AT_ONCE = 4


@dataclass(frozen=True)
class ImagePickles:
    k: int
    needs: str = ""

    @property
    def name(self) -> str:
        return "pickle an image (FKD)"

    @property
    def stores(self) -> str:
        return f"top-{self.k} probabilities float32, crop, flip"

    @property
    def note(self) -> str:
        return f"{AT_ONCE} views each time a file is opened; 500 views a file would take {17 + 8 * self.k} B a view"

    def write(self, folder: Path, rows: Rows) -> Written:
        coords, flip = np.zeros((rows.views, 4), np.float32), np.zeros(rows.views, bool)
        for image in range(rows.images):
            index, probability = top(rows.logits[:, image], self.k)
            labels = np.stack([index.astype(np.float32), probability], axis=1)
            path = folder / f"{image // 1000:04d}" / f"{image:08d}.tar"
            path.parent.mkdir(exist_ok=True)
            torch.save([coords, flip, labels], path)
        return Written()

    def open(self, folder: Path) -> PickleReader:
        return PickleReader(sorted(folder.glob("*/*.tar")))

    def dense(self, values: Values, classes: int) -> np.ndarray:
        return dense_top(values, classes)


class PickleReader:
    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    def _labels(self, image: int) -> np.ndarray:
        # A pickle can run any code: that is the format. These files were written a moment ago, by this process.
        return np.asarray(torch.load(self._paths[image], weights_only=False)[2])

    def epochs(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        views, files = len(self._labels(0)), len(self._paths)
        for first in range(0, views, AT_ONCE):
            some = np.arange(first, min(first + AT_ONCE, views))
            order = np.arange(files) if shuffle is None else shuffle.permutation(files)
            for start in range(0, files, BATCH // AT_ONCE):
                images = order[start : start + BATCH // AT_ONCE]
                labels = np.concatenate([self._labels(image)[some] for image in images])
                yield np.tile(some, len(images)), images.repeat(len(some)), split(labels)

    def batch(self, view: int, images: np.ndarray) -> Values:
        return split(np.stack([self._labels(image)[view] for image in images]))

    def close(self) -> None:
        pass


def split(labels: np.ndarray) -> Values:
    return {"index": labels[:, 0], "probability": labels[:, 1]}
