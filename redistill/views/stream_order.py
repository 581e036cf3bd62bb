"""The order of an epoch: a function of seed and epoch, random over all rows, or local to groups of tars.

Of tars that do not fit on the disk together, each is to be fetched once an epoch. So the tars are shuffled and cut into
groups of `window` tars, and the rows of a group are shuffled. The order is one of rows; batches are cut from it without
regard to groups, and ranks share every batch, so that any number of them sees the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from redistill_cache.errors import Refused

from redistill.sources.base import Source, streamed
from redistill.sources.stream import StreamSource
from redistill.views.recipe import Recipe

__all__ = ["EpochOrder", "epoch_order", "grouped_order", "refuse_mixing", "stream_settings"]

Rows = npt.NDArray[np.int64]


class EpochOrder(NamedTuple):
    """The rows of an epoch in order, where each group begins in it, and the tars of each group."""

    rows: Rows
    starts: Rows
    tars: Sequence[npt.NDArray[np.int64]]

    def group_at(self, position: int) -> int:
        """The group of the row at this position."""
        return int(np.searchsorted(self.starts, position, "right")) - 1


def epoch_order(seed: int, epoch: int, rows: Rows, source: Source, source_rows: Rows) -> EpochOrder:
    """These rows of a dataset, whose samples in `source` are `source_rows` [of all rows]."""
    tars = streamed(source)
    if tars is None:
        shuffled = _generator(seed, epoch).permutation(rows)
        return EpochOrder(shuffled, np.zeros(1, np.int64), [np.zeros(0, np.int64)])
    return grouped_order(seed, epoch, rows, tars.tar_of[source_rows[rows]].astype(np.int64), tars.window)


def grouped_order(seed: int, epoch: int, rows: Rows, tar_of_rows: Rows, window: int) -> EpochOrder:
    """Groups of at most `window` tars, in as few groups as possible, of sizes that differ by one at most."""
    draw = _generator(seed, epoch)
    tars = draw.permutation(np.unique(tar_of_rows))
    groups = np.array_split(tars, max(1, -(-len(tars) // window)))
    group_of_tar = np.zeros(int(tars.max(initial=-1)) + 1, np.int64)
    for number, group in enumerate(groups):
        group_of_tar[group] = number
    group_of_row = group_of_tar[tar_of_rows]
    by_group = rows[np.argsort(group_of_row, kind="stable")]
    sizes = np.bincount(group_of_row, minlength=len(groups))
    starts = np.cumsum(sizes) - sizes
    parts = [draw.permutation(by_group[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    return EpochOrder(np.concatenate(parts), starts, groups)


def stream_settings(source: Source, source_rows: Rows) -> dict[str, str]:
    """What the order of epochs depends on besides the seed, for a run that is resumed; nothing if no tars are streamed.

    The order is one of tars, so the same tars in another order, or packed in another way, have another one.
    """
    tars = streamed(source)
    if tars is None:
        return {}
    tar_of_rows = np.where(source_rows >= 0, tars.tar_of[source_rows], -1).astype(np.int64)
    return {"window": f"{tars.window} tars, rows {hashlib.sha256(tar_of_rows.tobytes()).hexdigest()[:12]}"}


def refuse_mixing(source: Source, recipe: Recipe) -> None:
    """A recipe that mixes images needs two tars for every image, and the second may be any."""
    if recipe.mixes and isinstance(source, StreamSource):
        raise Refused(
            f"{source.spec!r}: the recipe mixes each image with one of any tar, so the tars must be on the disk "
            "together; use stream=0, or an archive whose recipe does not mix"
        )


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
