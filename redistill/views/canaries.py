"""Canaries: a few views of an archive with a fingerprint of their pixels, to prove alignment without a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from redistill_cache.errors import Damaged, Refused, UsageError

from redistill.devices import one_thread
from redistill.sources.base import Source
from redistill.sources.join import Join
from redistill.views.counter import Purpose, below, draw_words
from redistill.views.dataset import ViewDataset
from redistill.views.environment import view_environment
from redistill.views.fingerprint import GRID, distance, explained, grid_positions
from redistill.views.provider import ArchiveViews, Rows, ViewArchive, Views
from redistill.views.suspects import suspect_renderings

__all__ = ["CANARIES_PER_VIEW", "Alignment", "WorstCanary", "align", "canary_rows", "check_canaries", "make_canaries"]

Pixels = npt.NDArray[np.uint8]

CANARIES_PER_VIEW = 64
CHECKED = 256  # canaries looked at by one check, over all views
CHECKED_VIEWS = 16
DECODED_AT_ONCE = 8
WORST = 3
MOST = 0.5


class CanaryArchive(ViewArchive, Protocol):
    """An opened archive with canaries."""

    def canaries(self, view: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]: ...


def canary_rows(seed: int, view: int, num_samples: int, count: int = CANARIES_PER_VIEW) -> npt.NDArray[np.uint32]:
    """The rows of one view that are its canaries: a uniform sample without repetition, ascending.

    Draws of a Fisher-Yates shuffle: draw k takes the place k + below(num_samples - k), counter row k.
    """
    draws = np.arange(min(count, num_samples))
    words = draw_words(seed, view, draws, Purpose.CANARY)[0]
    swapped: dict[int, int] = {}
    rows = []
    for k, step in enumerate(below(words, num_samples - draws).tolist()):
        rows.append(swapped.get(k + step, k + step))
        swapped[k + step] = swapped.get(k, k)
    return np.array(sorted(rows), np.uint32)


def make_canaries(
    source: Source | ViewDataset, views: Views, seed: int, view: int, count: int = CANARIES_PER_VIEW
) -> tuple[npt.NDArray[np.uint32], Pixels]:
    """What an archive stores for one view: rows [K] and fingerprints [K, 8, 8, 3] at the recipe's own size."""
    rows = canary_rows(seed, view, len(views.source_rows), count)
    dataset = ViewDataset(source.source if isinstance(source, ViewDataset) else source, views)
    return rows, fingerprints(dataset, view, rows)


def fingerprints(dataset: ViewDataset, view: int, rows: npt.NDArray[Any]) -> Pixels:
    """[n, 8, 8, 3]: the fingerprint of each of these views."""
    found = np.empty((len(rows), GRID, GRID, 3), np.uint8)
    with one_thread():
        for position, row in enumerate(rows.tolist()):
            found[position] = fingerprint(dataset[dataset.index(view, row)].pixels)
    return found


def fingerprint(pixels: torch.Tensor) -> Pixels:
    """[..., 8, 8, 3]: pixels of a view [..., 3, size, size] at the centres of an 8 x 8 grid."""
    at = grid_positions(pixels.shape[-1])
    return np.moveaxis(pixels.numpy()[..., at[:, None], at], -3, -1)


@dataclass(frozen=True)
class WorstCanary:
    view: int
    row: int
    key: str
    drift: float


@dataclass(frozen=True)
class Alignment:
    """Whether the views made here are those of the archive."""

    verdict: Literal["exact", "tolerance", "refused"]
    drift: float
    """Mean luma difference in grey levels."""
    checked: int
    reason: str = ""
    """Why it was refused."""
    worst: tuple[WorstCanary, ...] = ()
    versions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """What differs between the archive's environment and this one: (there, here)."""

    @property
    def message(self) -> str:
        """The verdict in one line."""
        if self.verdict == "exact":
            return f"views are exact: {self.checked} canaries equal to the last bit"
        versions = "; ".join(f"{name} {there} there, {here} here" for name, (there, here) in self.versions.items())
        if self.verdict == "tolerance":
            why = f" ({versions})" if versions else ""
            return f"views match within another decoder's tolerance: drift {self.drift:.2f} grey levels{why}"
        worst = ", ".join(f"view {w.view} row {w.row} {w.key!r} by {w.drift:.1f}" for w in self.worst)
        return (
            f"views made here are not those the teacher saw: expected the fingerprints of the archive, found that "
            f"{self.reason} (worst: {worst}); use the images and the version of the recipe the archive was made with"
            + (f" ({versions})" if versions else "")
        )

    def require(self) -> Alignment:
        """Itself, unless the views are refused: then the error a training run stops with."""
        if self.verdict == "refused":
            raise Refused(self.message)
        return self

    def to_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "drift": self.drift,
            "checked": self.checked,
            "reason": self.reason,
            "worst": [vars(worst) for worst in self.worst],
            "versions": {name: list(pair) for name, pair in self.versions.items()},
        }


def check_canaries(
    source: Source, archive: CanaryArchive, joined: Join, *, views: Sequence[int] | None = None
) -> Alignment:
    """Make the canaries of an archive again from the reader's own images, and compare.

    Looks at 256 canaries at most, spread evenly over 16 views at most (of `views`, or all).
    """
    provider = ArchiveViews(archive, joined)
    asked = list(range(archive.num_views)) if views is None else list(views)
    if not asked:
        raise UsageError("expected at least one view whose canaries to check, found none")
    most = max(1, CHECKED // max(1, min(len(asked), CHECKED_VIEWS)))
    stored = {}
    for view in _spread(asked):
        rows, pixels = archive.canaries(view)
        stored[view] = _chosen(provider, view, rows, pixels, most)
    there, here = archive.spec.environment, view_environment()
    versions = {name: (str(there[name]), here[name]) for name in here if name in there and there[name] != here[name]}
    return align(ViewDataset(source, provider), stored, keys=archive.keys, versions=versions)


def _spread(views: Sequence[int]) -> list[int]:
    if len(views) <= CHECKED_VIEWS:
        return list(views)
    return [views[i * len(views) // CHECKED_VIEWS] for i in range(CHECKED_VIEWS)]


def _chosen(provider: Views, view: int, rows: npt.NDArray[Any], pixels: Pixels, most: int) -> tuple[Rows, Pixels]:
    """`most` canaries of one view, evenly; those whose image the reader does not have cannot be looked at."""
    rows = rows.astype(np.int64)
    if len(rows) and rows.max() >= len(provider.source_rows):
        raise Damaged(f"a canary of view {view} is row {rows.max()}, beyond the {len(provider.source_rows)} rows")
    here = provider.source_rows >= 0
    usable = here[rows]
    if provider.recipe.mixes:
        usable &= here[provider.params(view, rows)["mix_partner"]]
    kept = np.flatnonzero(usable)
    if len(kept) > most:
        kept = kept[np.arange(most) * len(kept) // most]
    return rows[kept], pixels[kept]


def align(
    dataset: ViewDataset,
    stored: Mapping[int, tuple[Rows, Pixels]],
    *,
    keys: Sequence[str] = (),
    versions: Mapping[str, tuple[str, str]] | None = None,
) -> Alignment:
    """Compare stored fingerprints {view: (rows, pixels)} with the views of a dataset at the recipe's own size."""
    versions = versions or {}
    theirs = np.concatenate([pixels for _, pixels in stored.values()])
    if not len(theirs):
        raise Refused("none of the archive's canaries has its image here, so nothing proves that views match")
    here = np.concatenate([fingerprints(dataset, view, rows) for view, (rows, _) in stored.items()])
    if np.array_equal(theirs, here):
        return Alignment("exact", 0.0, len(theirs), versions=versions)
    apart = distance(theirs, here, reduction=_reduction(dataset, stored))
    reason = apart.misfit()
    if not apart.hopeless:
        # Small differences may still follow a wrong rendering; of larger ones it is good to know the cause.
        cause = explained(theirs, here, _suspects(dataset, stored), share=0.0 if reason is None else MOST)
        reason = reason if cause is None else f"the archive's views look {cause}"
    if reason is None:
        return Alignment("tolerance", apart.drift, len(theirs), versions=versions)
    places = [(view, int(row)) for view, (rows, _) in stored.items() for row in rows]
    worst = []
    for i in np.argsort(-apart.rows, kind="stable")[:WORST].tolist():
        view, row = places[i]
        worst.append(WorstCanary(view, row, keys[row] if keys else "", float(apart.rows[i])))
    return Alignment("refused", apart.drift, len(theirs), reason, tuple(worst), versions)


def _reduction(dataset: ViewDataset, stored: Mapping[int, tuple[Rows, Pixels]]) -> float:
    """How many source pixels one pixel of a view stands for, along an axis: the median over canaries."""
    boxes = [dataset.views.params(view, rows)["crop"] for view, (rows, _) in stored.items()]
    return float(np.median(np.concatenate(boxes)[:, 2:])) / dataset.size


def _suspects(dataset: ViewDataset, stored: Mapping[int, tuple[Rows, Pixels]]) -> dict[str, Pixels]:
    """What the canaries would be under each rendering that could have been mistaken for the recipe's."""
    found: dict[str, list[Pixels]] = {}
    for view, (rows, _) in stored.items():
        for start in range(0, len(rows), DECODED_AT_ONCE):
            some = rows[start : start + DECODED_AT_ONCE]
            for name, suspect in suspect_renderings(dataset, view, some):
                found.setdefault(name, []).append(fingerprints(suspect, view, some))
    return {name: np.concatenate(pixels) for name, pixels in found.items()}
