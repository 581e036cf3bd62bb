"""Canaries: fingerprints of a few views, stored in an archive, that prove alignment without the teacher.

The reader renders the same views from its own images and compares. Equal fingerprints are exact; small differences of
the kind that other decoders cause are tolerated; anything else is refused, with the cause if it can be determined.
"""

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
from redistill.sources.base import Sample, Source, StreamedSource
from redistill.sources.images import decode_array
from redistill.views.counter import Purpose, below, draw_words
from redistill.views.fingerprint import GRID, best_explanation, distance, grid_positions
from redistill.views.recipe import Recipe
from redistill.views.view_params import Params, Rows, ViewArchive, Views

__all__ = [
    "CANARIES_PER_VIEW",
    "Alignment",
    "AlteredViews",
    "WorstCanary",
    "align",
    "canary_rows",
    "check_canaries",
    "fingerprint",
    "fingerprints",
    "view_environment",
]

Pixels = npt.NDArray[np.uint8]


class Dataset(Protocol):
    """The part of a `ViewDataset` that canaries need; it checks them when it is made."""

    source: Source
    views: Views
    size: int

    def index(self, view: int, row: int) -> int: ...
    def __getitem__(self, index: int) -> Any: ...  # noqa: ANN401  a RenderedView or MixedView
    def with_views(self, source: Source, views: Views) -> Dataset:
        """Other views, or of other images, as a dataset of the recipe's size without a transform."""


CANARIES_PER_VIEW = 64
MAX_CHECKED = 256  # canaries compared by one check, over all views
MAX_CHECKED_VIEWS = 16
WORST = 3  # canaries listed in a refusal


# -- what an archive stores -------------------------------------------------------------------------------------------


def canary_rows(seed: int, view: int, num_samples: int, count: int = CANARIES_PER_VIEW) -> npt.NDArray[np.uint32]:
    """The rows of one view that are its canaries: a uniform sample without repetition, ascending.

    The first `count` steps of a Fisher-Yates shuffle: step k, drawn at counter row k, swaps rows k and
    k + below(num_samples - k).
    """
    draws = np.arange(min(count, num_samples))
    words = draw_words(seed, view, draws, Purpose.CANARY)[0]
    swapped: dict[int, int] = {}
    rows = []
    for k, step in enumerate(below(words, num_samples - draws).tolist()):
        rows.append(swapped.get(k + step, k + step))
        swapped[k + step] = swapped.get(k, k)
    return np.array(sorted(rows), np.uint32)


def fingerprints(dataset: Dataset, view: int, rows: npt.NDArray[Any]) -> Pixels:
    """[n, 8, 8, 3]: the fingerprint of one view of each of these rows."""
    pixels = np.empty((len(rows), GRID, GRID, 3), np.uint8)
    with one_thread():
        for position, row in enumerate(rows.tolist()):
            pixels[position] = fingerprint(dataset[dataset.index(view, row)].pixels)
    return pixels


def fingerprint(pixels: torch.Tensor) -> Pixels:
    """[..., 8, 8, 3]: the pixels of a view [..., 3, size, size] at the centres of an 8 x 8 grid."""
    centres = grid_positions(pixels.shape[-1])
    return np.moveaxis(pixels.numpy()[..., centres[:, None], centres], -3, -1)


def view_environment() -> dict[str, str]:
    """The versions that decide the last bit of a pixel: decoder, resizer and processor, as plain JSON."""
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
    """The model name of the processor on Linux, elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


# -- the check --------------------------------------------------------------------------------------------------------


class CanaryArchive(ViewArchive, Protocol):
    """An opened archive with canaries."""

    def canaries(self, view: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]: ...


@dataclass(frozen=True)
class WorstCanary:
    view: int
    row: int
    key: str
    drift: float


@dataclass(frozen=True)
class Alignment:
    """Whether the views rendered from the reader's images are those of the archive."""

    verdict: Literal["exact", "tolerance", "refused", "no canaries"]
    drift: float
    """Mean luma difference in grey levels."""
    checked: int
    reason: str = ""
    """Why it was refused."""
    worst: tuple[WorstCanary, ...] = ()
    versions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Entries of `view_environment` that differ: (in the archive, on this machine)."""

    @property
    def ok(self) -> bool:
        return self.verdict in ("exact", "tolerance")

    @property
    def message(self) -> str:
        """The verdict in one line."""
        if self.verdict == "no canaries":
            return "the archive has no canaries, so the views cannot be compared with those of the teacher"
        if self.verdict == "exact":
            return f"views are exact: all {self.checked} canaries are bit-identical"
        versions = "; ".join(
            f"{name} {archived} in the archive, {installed} here"
            for name, (archived, installed) in self.versions.items()
        )
        versions = f" ({versions})" if versions else ""
        if self.verdict == "tolerance":
            return f"views match within the tolerance for decoders: drift {self.drift:.2f} grey levels{versions}"
        worst = ", ".join(f"view {w.view} row {w.row} {w.key!r} by {w.drift:.1f}" for w in self.worst)
        return (
            f"views do not match the archive: {self.reason} (worst: {worst}); "
            f"use the images and the version of the recipe that the archive was made with{versions}"
        )

    def require(self) -> Alignment:
        """Returns itself; raises `Refused` if the views do not match, or could not be compared."""
        if not self.ok:
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


def check_canaries(dataset: Dataset, archive: CanaryArchive, *, views: Sequence[int] | None = None) -> Alignment:
    """Render canaries of an archive from the reader's own images, of which `dataset` is made, and compare.

    Checks at most 256 canaries, spread evenly over at most 16 of `views` (by default, of all views).
    """
    if not archive.spec.canaries_per_view:
        raise Refused(
            "the archive has no canaries, so its views cannot be compared with those of the teacher; pass check=False "
            "to use them unverified"
        )
    candidates = list(range(archive.num_views)) if views is None else list(views)
    if not candidates:
        raise UsageError("expected at least one view whose canaries to check, found none")
    checked = _spread(candidates, MAX_CHECKED_VIEWS)
    stored = {}
    for view in checked:
        rows, pixels = archive.canaries(view)
        stored[view] = _usable(dataset.views, view, rows, pixels, max(1, MAX_CHECKED // len(checked)))
    archived, installed = archive.spec.environment, view_environment()
    versions = {
        name: (str(archived[name]), value)
        for name, value in installed.items()
        if name in archived and archived[name] != value
    }
    source = _with_images(dataset.source, dataset.views, stored)
    return align(dataset.with_views(source, dataset.views), stored, keys=archive.keys, versions=versions)


def _with_images(source: Source, views: Views, stored: Mapping[int, tuple[Rows, Pixels]]) -> Source:
    """The source; of streamed tars, the images of these rows are read together, and their tars are not fetched."""
    if not isinstance(source, StreamedSource):
        return source
    needed = [rows for rows, _ in stored.values()]
    if views.recipe.mixes:
        needed += [views.params(view, rows)["mix_partner"].astype(np.int64) for view, (rows, _) in stored.items()]
    return source.by_parts().loaded(views.source_rows[np.unique(np.concatenate(needed))].tolist())


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spaced."""
    if len(values) <= count:
        return list(values)
    return [values[i * len(values) // count] for i in range(count)]


def _usable(views: Views, view: int, rows: npt.NDArray[Any], pixels: Pixels, count: int) -> tuple[Rows, Pixels]:
    """At most `count` canaries of one view, evenly spaced, among those whose images the reader has."""
    rows = rows.astype(np.int64)
    if len(rows) and rows.max() >= len(views.source_rows):
        raise Damaged(f"a canary of view {view} is row {rows.max()}, beyond the {len(views.source_rows)} rows")
    present = views.source_rows >= 0
    usable = present[rows]
    if views.recipe.mixes:
        usable &= present[views.params(view, rows)["mix_partner"]]
    selected = _spread(np.flatnonzero(usable).tolist(), count)
    return rows[selected], pixels[selected]


def align(
    dataset: Dataset,
    stored: Mapping[int, tuple[Rows, Pixels]],
    *,
    keys: Sequence[str] = (),
    versions: Mapping[str, tuple[str, str]] | None = None,
) -> Alignment:
    """Compare stored fingerprints {view: (rows, pixels)} with the views of a dataset at the recipe's own size."""
    versions = versions or {}
    expected = np.concatenate([pixels for _, pixels in stored.values()])
    if not len(expected):
        raise Refused("the source has no image of any of the archive's canaries, so the views cannot be compared")
    rendered = np.concatenate([fingerprints(dataset, view, rows) for view, (rows, _) in stored.items()])
    if np.array_equal(expected, rendered):
        return Alignment("exact", 0.0, len(expected), versions=versions)
    result = distance(expected, rendered, reduction=_reduction(dataset, stored))
    reason = result.mismatch()
    if not result.other_content:
        # A small difference may still be that of a wrong rendering; a larger one is explained where most of it is.
        share = 0.0 if reason is None else 0.5
        cause = best_explanation(expected, rendered, _wrong_fingerprints(dataset, stored), share=share)
        reason = reason if cause is None else f"the archive's views look {cause}"
    if reason is None:
        return Alignment("tolerance", result.drift, len(expected), versions=versions)
    places = [(view, int(row)) for view, (rows, _) in stored.items() for row in rows]
    worst = []
    for i in np.argsort(-result.rows, kind="stable")[:WORST].tolist():
        view, row = places[i]
        worst.append(WorstCanary(view, row, keys[row] if keys else "", float(result.rows[i])))
    return Alignment("refused", result.drift, len(expected), reason, tuple(worst), versions)


def _reduction(dataset: Dataset, stored: Mapping[int, tuple[Rows, Pixels]]) -> float:
    """The number of source pixels per pixel of a view, along an axis: the median over canaries."""
    boxes = [dataset.views.params(view, rows)["crop"] for view, (rows, _) in stored.items()]
    return float(np.median(np.concatenate(boxes)[:, 2:])) / dataset.size


# -- wrong renderings -------------------------------------------------------------------------------------------------
#
# Errors that change pixels so little that they could be mistaken for another decoder: another interpolation, or a crop
# that is off by a pixel.

RESIZINGS = (("bilinear", True), ("bilinear", False), ("bicubic", True), ("bicubic", False), ("nearest", False))
NUDGES = {
    "cropped one pixel lower or higher": (1, 0, 0, 0),
    "cropped one pixel further right or left": (0, 1, 0, 0),
    "cropped one pixel taller or shorter": (0, 0, 1, 0),
    "cropped one pixel wider or narrower": (0, 0, 0, 1),
}
DECODED_AT_ONCE = 8  # images in memory


def _wrong_fingerprints(dataset: Dataset, stored: Mapping[int, tuple[Rows, Pixels]]) -> dict[str, Pixels]:
    """The fingerprints of the canaries under each wrong rendering, by its name."""
    parts: dict[str, list[Pixels]] = {}
    for view, (rows, _) in stored.items():
        for start in range(0, len(rows), DECODED_AT_ONCE):
            chunk = rows[start : start + DECODED_AT_ONCE]
            for name, wrong in _wrong_renderings(dataset, view, chunk):
                parts.setdefault(name, []).append(fingerprints(wrong, view, chunk))
    return {name: np.concatenate(pixels) for name, pixels in parts.items()}


def _wrong_renderings(dataset: Dataset, view: int, rows: Rows) -> Iterator[tuple[str, Dataset]]:
    """Each wrong rendering: its name and a dataset of these rows; images are decoded once for all of them."""
    views, recipe = dataset.views, dataset.views.recipe
    needed = [rows]
    if recipe.mixes:
        needed.append(views.params(view, rows)["mix_partner"].astype(np.int64))
    images = DecodedSource(dataset.source, views.source_rows[np.concatenate(needed)])
    own = (recipe.interpolation, recipe.antialias or recipe.interpolation == "nearest")
    for interpolation, antialias in RESIZINGS:
        if (interpolation, antialias or interpolation == "nearest") != own:
            name = f"resized by {interpolation} interpolation"
            name += "" if interpolation == "nearest" else f", {'with' if antialias else 'without'} antialiasing"
            other = replace(recipe, interpolation=interpolation, antialias=antialias)
            yield name, dataset.with_views(images, AlteredViews(views, other))
    for name, nudge in NUDGES.items():
        yield name, dataset.with_views(images, AlteredViews(views, recipe, nudge, images.sizes))


class DecodedSource:
    """Some samples of a source, decoded in memory; the others cannot be read."""

    def __init__(self, source: Source, source_rows: npt.NDArray[np.int64]) -> None:
        self.spec, self.class_names = source.spec, source.class_names
        self.description: Mapping[str, Any] = source.description
        self.total = len(source)
        self.samples: dict[int, Sample] = {}
        for i in np.unique(source_rows).tolist():
            sample = source.sample(i)
            self.samples[i] = replace(
                sample, payload=decode_array(sample.payload, name=sample.key, max_pixels=sample.max_pixels)
            )
        self.sizes = {i: np.shape(sample.payload)[:2] for i, sample in self.samples.items()}

    def __len__(self) -> int:
        return self.total

    def sample(self, i: int) -> Sample:
        return self.samples[i]


class AlteredViews:
    """Views under another recipe, or with crops moved by `nudge` where the image is large enough."""

    def __init__(
        self,
        views: Views,
        recipe: Recipe,
        nudge: tuple[int, int, int, int] = (0, 0, 0, 0),
        sizes: Mapping[int, tuple[int, ...]] | None = None,
    ) -> None:
        self.views, self.recipe = views, recipe
        self.num_views, self.labels, self.source_rows = views.num_views, views.labels, views.source_rows
        self.digests = views.digests
        self.nudge, self.sizes = np.array(nudge), sizes or {}

    def params(self, view: int, rows: Rows) -> Params:
        params = self.views.params(view, rows)
        if not self.nudge.any():
            return params
        sizes = np.array([self.sizes[i] for i in self.source_rows[rows].tolist()])
        moved = params["crop"] + self.nudge
        fits = (moved[:, :2] + moved[:, 2:] <= sizes).all(axis=1)
        return {**params, "crop": np.where(fits[:, None], moved, params["crop"])}
