"""A source of images in memory that records which of them are read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from redistill.sources.base import Sample


class ImageSource:
    """Encoded or decoded images in any order; image k has the label `k % classes` and the key "k.jpg" or "k.npy"."""

    def __init__(
        self, payloads: Sequence[bytes | np.ndarray], order: Sequence[int] | None = None, classes: int = 5
    ) -> None:
        self.payloads, self.classes = payloads, classes
        self.order = range(len(payloads)) if order is None else order
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.order)

    def sample(self, i: int) -> Sample:
        number = self.order[i]
        self.reads.append(number)
        payload = self.payloads[number]
        suffix = "jpg" if isinstance(payload, bytes) else "npy"
        return Sample(payload, number % self.classes, f"{number}.{suffix}")
