"""One view of an archive, without a dataset: to look at, or to compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from redistill_cache.errors import OutOfRange, Refused
from redistill_cache.keys import pack_keys

from redistill.sources.base import ListedSource, Sample, Source, digest_of
from redistill.sources.images import decode_image
from redistill.sources.opening import open_source
from redistill.views.provider import ViewArchive, archive_recipe, join_archive
from redistill.views.render import Partner, render_view, row_params
from redistill.views.units import WEIGHT_UNIT

__all__ = ["find_sample", "render"]


def render(
    source: Source | str | Any,  # noqa: ANN401  or any object that can be made a source
    archive: ViewArchive,
    row: int,
    view: int,
    size: int | None = None,
) -> torch.Tensor:
    """The very view that the teacher saw: uint8 [3, size, size], the recipe's own size where none is given.

    The image is looked up by content, so the order of the source does not matter; refused when it has changed.
    """
    source = open_source(source)
    recipe = archive_recipe(archive)
    for what, value, count in (("row", row, archive.num_samples), ("view", view, archive.num_views)):
        if not 0 <= value < count:
            raise OutOfRange(f"expected a {what} in [0, {count}), found {value}")
    params = row_params(archive.view_params(view, [row]), 0)
    partner: Partner | None = None
    if recipe.mixes and int(params["mix_weight"]) != WEIGHT_UNIT:
        other = int(params["mix_partner"])
        partner = _decoded(source, archive, other), row_params(archive.view_params(view, [other]), 0)
    return render_view(_decoded(source, archive, row), params, recipe, size, partner)


def _decoded(source: Source, archive: ViewArchive, row: int) -> torch.Tensor:
    sample = find_sample(source, archive, row)
    return decode_image(sample.payload, name=sample.key)


def find_sample(source: Source, archive: ViewArchive, row: int) -> Sample:
    """The sample that the row was made from: looked for at its place, then by its key, then everywhere."""
    key, digest = archive.keys[row], np.asarray(archive.digests[row]).tobytes()
    for place in _likely_places(source, key, row):
        sample = source.sample(place)
        if digest_of(sample.payload, name=sample.key) == digest:
            return sample
    place = int(join_archive(source, archive, allow_missing=True).source_row_of_archive_row[row])
    if place < 0:
        raise Refused(f"row {row} ({key!r}): the source has no image with the bytes that the archive was made from")
    return source.sample(place)


def _likely_places(source: Source, key: str, row: int) -> Iterator[int]:
    if row < len(source):
        yield row
    if isinstance(source, ListedSource):
        yield from np.flatnonzero(source.keys.hashes() == pack_keys([key]).hashes()[0]).tolist()
