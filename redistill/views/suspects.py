"""Renderings that could be mistaken for a recipe's: other interpolations, and crops that are a pixel off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from redistill.sources.base import Sample, Source
from redistill.sources.images import decode_array
from redistill.views.dataset import ViewDataset
from redistill.views.provider import Params, Rows, Views
from redistill.views.recipe import Recipe

__all__ = ["suspect_renderings"]

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
