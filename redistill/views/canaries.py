"""Canaries: a few views of an archive with a fingerprint of their pixels, to prove alignment without a teacher."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import features
from redistill_cache.errors import Damaged, Refused, UsageError

from redistill.devices import one_thread
from redistill.sources.base import Sample, Source
from redistill.sources.images import decode_array
from redistill.sources.join import Join
from redistill.views.counter import Purpose, below, draw_words
from redistill.views.dataset import ViewDataset
from redistill.views.fingerprint import GRID, distance, explained, grid_positions
from redistill.views.recipe import Recipe
from redistill.views.view_params import ArchiveViews, Params, Rows, ViewArchive, Views

__all__ = [
    "CANARIES_PER_VIEW",
    "Alignment",
    "WorstCanary",
    "align",
    "canary_rows",
    "check_canaries",
    "make_canaries",
    "suspect_renderings",
    "view_environment",
]


# -- environment ------------------------------------------------------------------------------------------------------
#
# What decides the last bit of a pixel: the versions an archive notes, and a reader compares its own with.


def view_environment() -> dict[str, str]:
    """Decoder, resizer and processor of this machine, as plain JSON."""
    return {
        "pillow": version("pillow"),
        "libjpeg": _libjpeg(),
        "torchvision": version("torchvision"),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _libjpeg() -> str:
    if features.check_feature("libjpeg_turbo"):
        return f"libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
    return f"libjpeg {features.version_codec('jpg')}"


def _processor() -> str:
    """The processor's own name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


# -- suspects ---------------------------------------------------------------------------------------------------------
#
# Renderings that could be mistaken for a recipe's: other interpolations, and crops that are a pixel off.

RESIZINGS = (("bilinear", True), ("bilinear", False), ("bicubic", True), ("bicubic", False), ("nearest", False))
NUDGES = {
    "cropped one pixel lower or higher": (1, 0, 0, 0),
    "cropped one pixel further right or left": (0, 1, 0, 0),
    "cropped one pixel taller or shorter": (0, 0, 1, 0),
    "cropped one pixel wider or narrower": (0, 0, 0, 1),
}


def suspect_renderings(dataset: ViewDataset, view: int, rows: Rows) -> Iterator[tuple[str, ViewDataset]]:
    """By name, a dataset that shows these rows in each wrong way; every image is decoded once for all of them."""
    views, recipe = dataset.views, dataset.views.recipe
    needed = [rows]
    if recipe.mixes:
        needed.append(views.params(view, rows)["mix_partner"].astype(np.int64))
    images = DecodedSource(dataset.source, views.source_rows[np.concatenate(needed)])
    own = (recipe.interpolation, recipe.antialias or recipe.interpolation == "nearest")
    for interpolation, antialias in RESIZINGS:
        if (interpolation, antialias or interpolation == "nearest") != own:
            how = f"resized by {interpolation} interpolation"
            how += "" if interpolation == "nearest" else f", {'with' if antialias else 'without'} antialiasing"
            other = replace(recipe, interpolation=interpolation, antialias=antialias)
            yield how, ViewDataset(images, AlteredViews(views, other))
    for how, nudge in NUDGES.items():
        yield how, ViewDataset(images, AlteredViews(views, recipe, nudge, images.sizes))


class DecodedSource:
    """Some samples of a source, decoded and kept; the others are not there."""

    def __init__(self, source: Source, source_rows: npt.NDArray[np.int64]) -> None:
        self.spec, self.class_names = source.spec, source.class_names
        self.description: Mapping[str, Any] = source.description
        self.total = len(source)
        self.samples: dict[int, Sample] = {}
        for place in np.unique(source_rows).tolist():
            sample = source.sample(place)
            self.samples[place] = replace(sample, payload=decode_array(sample.payload, name=sample.key))
        self.sizes = {place: np.shape(sample.payload)[:2] for place, sample in self.samples.items()}

    def __len__(self) -> int:
        return self.total

    def sample(self, i: int) -> Sample:
        return self.samples[i]


class AlteredViews:
    """Views under another recipe, or with crops moved by `nudge` where the image has room for it."""

    def __init__(
        self,
        views: Views,
        recipe: Recipe,
        nudge: tuple[int, int, int, int] = (0, 0, 0, 0),
        sizes: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.views, self.recipe = views, recipe
        self.num_views, self.labels, self.source_rows = views.num_views, views.labels, views.source_rows
        self.nudge, self.sizes = np.array(nudge), sizes or {}

    def params(self, view: int, rows: Rows) -> Params:
        params = self.views.params(view, rows)
        if not self.nudge.any():
            return params
        sizes = np.array([self.sizes[place] for place in self.source_rows[rows].tolist()])
        moved = params["crop"] + self.nudge
        room = (moved[:, :2] + moved[:, 2:] <= sizes).all(axis=1)
        return {**params, "crop": np.where(room[:, None], moved, params["crop"])}


# -- canaries ---------------------------------------------------------------------------------------------------------

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
