"""How fast a run goes, and which share of the time is spent waiting for data."""

from __future__ import annotations

import time
from typing import NamedTuple

from redistill.training.feed import Batch

__all__ = ["Clock", "Lap"]


class Lap(NamedTuple):
    seconds: float
    images_per_second: float
    waiting: float
    """Share of the time in which no batch was there, or its teacher's rows were not."""


class Clock:
    """Runs while an epoch is trained; validation and checkpoints are not counted."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.begun = self.last = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def got(self) -> None:
        """A batch is there."""
        self.waited += time.perf_counter() - self.last

    def done(self, images: int) -> None:
        """It has been used."""
        self.last = time.perf_counter()
        self.images += images

    def lap(self) -> Lap:
        seconds = max(time.perf_counter() - self.begun, 1e-9)
        return Lap(seconds, self.images / seconds, self.waited / seconds)


def images_of_run(batch: Batch, epochs: int) -> tuple[int, int]:
    """About how many images are done after this batch, and how many there are in all: batches are equal but for one."""
    epoch = batch.global_rows * batch.place.batches
    return batch.place.epoch * epoch + (batch.place.batch + 1) * batch.global_rows, epochs * epoch
