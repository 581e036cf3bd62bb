"""Interface of a format: it writes the rows of some views of some images, and reads them back in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

BATCH = 256

Values = Mapping[str, np.ndarray]
"""Rows as a format returns them: arrays [n, ...] by name, in memory and owned by the caller."""

Batch = tuple[int | np.ndarray, np.ndarray, Values]
"""(view or views, images, values): a format must say which images its rows belong to."""


@dataclass(frozen=True)
class Rows:
    """Logits of every view of every image, float32 [views, images, classes].

    Rows are few ones repeated, each time with a little noise of its own so that no compressor sees a row twice:
    `logits[view, image]` is `known[pick[view, image]]` but for the noise.
    """

    logits: np.ndarray
    known: np.ndarray
    pick: np.ndarray

    @classmethod
    def drawn(cls, known: np.ndarray, views: int, images: int, seed: int = 0) -> Rows:
        rng = np.random.default_rng(seed)
        pick = rng.integers(0, len(known), (views, images))
        logits = np.empty((views, images, known.shape[1]), np.float32)
        for view in range(views):
            rng.standard_normal(out=logits[view], dtype=np.float32)
            logits[view] *= 0.02
            logits[view] += known[pick[view]]
        return cls(logits, known, pick)

    @property
    def views(self) -> int:
        return len(self.logits)

    @property
    def images(self) -> int:
        return len(self.logits[0])


@dataclass(frozen=True)
class Written:
    """Corrections to the measured time and size of writing."""

    owed_seconds: float = 0.0  # work that was done once for rows that occur many times
    fixed_bytes: int = 0  # written once, whatever the number of views


class Reader(Protocol):
    def epochs(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        """Every row once, one epoch per view: in the order of the files, or as users of the format shuffle."""

    def batch(self, view: int, images: np.ndarray) -> Values | None:
        """These rows of a view that is not in memory; None where a format cannot."""

    def close(self) -> None: ...


class Format(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def stores(self) -> str:
        """What is stored of a row."""

    @property
    def note(self) -> str:
        """What to know when reading its numbers."""

    @property
    def needs(self) -> str:
        """The package it needs beside what redistill needs; empty if none."""

    def write(self, folder: Path, rows: Rows) -> Written: ...

    def open(self, folder: Path) -> Reader: ...

    def dense(self, values: Values, classes: int) -> np.ndarray:
        """float32 [n, classes]: logits, or log-probabilities where those are stored, ready for a loss."""


def schedule(views: int, images: int, shuffle: np.random.Generator | None) -> Iterator[tuple[int, np.ndarray]]:
    """(view, images) of every batch, for a format that can read any rows in any order."""
    for view in range(views):
        order = np.arange(images) if shuffle is None else shuffle.permutation(images)
        for start in range(0, images, BATCH):
            yield view, order[start : start + BATCH]


def stacked(view: int, samples: Iterable[tuple[int, np.ndarray]]) -> Iterator[Batch]:
    """Batches of (image, logits) that come one after another."""
    images: list[int] = []
    rows: list[np.ndarray] = []
    for image, row in samples:
        images.append(image)
        rows.append(row)
        if len(rows) == BATCH:
            yield view, np.array(images), {"logits": np.stack(rows)}
            images, rows = [], []
    if rows:
        yield view, np.array(images), {"logits": np.stack(rows)}
