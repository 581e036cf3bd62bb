"""A map-style dataset of views. The index encodes view and row, so workers hold no state that can go stale."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from redistill_cache.errors import OutOfRange, Refused
from redistill_cache.keys import pack_keys

from redistill.sources.base import ListedSource, Sample, Source, StreamedSource, digest_of, in_any_order
from redistill.sources.images import decode_image
from redistill.sources.join import Join
from redistill.sources.open_source import open_source
from redistill.views.canaries import CanaryArchive, check_canaries
from redistill.views.recipe import WEIGHT_UNIT
from redistill.views.render import Partner, render_view, row_params
from redistill.views.view_params import (
    ArchiveViews,
    Rows,
    ViewArchive,
    Views,
    archive_recipe,
    join_archive,
    usable_rows,
)

__all__ = ["MixedView", "RenderedView", "ViewDataset", "render"]


class RenderedView(NamedTuple):
    """One view: pixels uint8 [3, size, size], and its label, row and view."""

    pixels: torch.Tensor
    label: int
    row: int
    view: int


class MixedView(NamedTuple):
    """One view of a recipe that mixes; an unmixed row is its own partner, with the weight 1.

    The first four fields are those of a `RenderedView`: `pixels, labels, rows, views, *mix = batch` reads both.
    """

    pixels: torch.Tensor
    label: int
    row: int
    view: int
    partner: int
    partner_label: int
    weight: np.float32
    """The weight of the row's own view in the pixels, and so of its label."""


class ViewDataset(torch.utils.data.Dataset[RenderedView | MixedView]):
    """All views of all rows: item `view * num_rows + row` (see `index`) is a `RenderedView`, or a `MixedView`.

    Sample from `indices(view)`, in any order; persistent workers serve the next view as well, because the index
    encodes the view. Pixels are uint8: normalise on the device, or with `transform`, which is applied to the pixels of
    every item. It must not move them: the teacher's logits are those of the views as they are.

        dataset = ViewDataset("folder:imagenet/train", archive, size=224)
        loader = DataLoader(dataset, batch_size=256, sampler=dataset.indices(view), num_workers=8)
    """

    def __init__(
        self,
        source: Source | str | Any,  # noqa: ANN401  or any object that `open_source` accepts
        views: CanaryArchive | Views,
        *,
        size: int | None = None,
        joined: Join | None = None,
        check: bool = True,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """`views` is an archive, or other `Views`; an archive is joined to the source unless `joined` is passed.

        Canaries of the archive are rendered and compared, as `redistill verify --data` does: `Refused` if these are not
        the views that its teacher saw. Pass `check=False` if that has been done, or if the archive has no canaries.
        `size` is the side of the rendered views, by default the recipe's.
        """
        self.source: Source = open_source(source)
        self.transform = transform
        archive: CanaryArchive | None = None
        if not isinstance(views, Views):
            archive, views = views, ArchiveViews(views, join_archive(self.source, views) if joined is None else joined)
        self.views = views
        self.size = views.recipe.size if size is None else size
        self.num_rows = len(views.source_rows)
        if check and archive is not None:
            check_canaries(self, archive).require()

    def by_parts(self) -> ViewDataset:
        """The same dataset for use in any order: of streamed tars that are not here, only single images are read."""
        other = copy.copy(self)
        other.source = in_any_order(self.source)
        return other

    def __repr__(self) -> str:
        return f"<ViewDataset: {self.num_rows} rows, {self.views.num_views} views of {self.size} pixels>"

    def __len__(self) -> int:
        return self.views.num_views * self.num_rows

    def index(self, view: int, row: int) -> int:
        """The index of one view of one row."""
        return view * self.num_rows + row

    def indices(self, view: int) -> Rows:
        """The indices of one view of every row that can be rendered, in order."""
        return view * self.num_rows + usable_rows(self.views, view)

    def without(self, rows: Rows) -> ViewDataset:
        """The dataset in which these rows cannot be rendered, nor the rows whose views are mixed with them."""
        views = copy.copy(self.views)
        views.source_rows = self.views.source_rows.copy()
        views.source_rows[rows] = -1
        return ViewDataset(self.source, views, size=self.size, transform=self.transform)

    def with_views(self, source: Source, views: Views) -> ViewDataset:
        """Other views, or of other images, at the size of their recipe."""
        return ViewDataset(source, views)

    def __getitem__(self, index: int) -> RenderedView | MixedView:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[RenderedView | MixedView]:
        """A batch: parameters are read together, and an image needed by several items is decoded once."""
        index = np.asarray(indices, np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise OutOfRange(f"expected indices in [0, {len(self)}), found {index.min()} to {index.max()}")
        views, rows = np.divmod(index, self.num_rows)
        plans = [self._plan(int(view), np.flatnonzero(views == view), rows) for view in np.unique(views)]
        images = _Images(self.source, self.views)
        for plan in plans:
            images.count_uses(plan.rows)
            images.count_uses(plan.partners[plan.mixed])
        images.load()
        items: dict[int, RenderedView | MixedView] = {}
        for plan in plans:
            for i, position in enumerate(plan.positions.tolist()):
                items[position] = self._render(plan, i, images)
        return [items[position] for position in range(len(index))]

    def _plan(self, view: int, positions: Rows, batch_rows: Rows) -> _Plan:
        rows = batch_rows[positions]
        params = self.views.params(view, rows)
        if not self.views.recipe.mixes:
            return _Plan(view, positions, rows, params, rows, np.zeros(len(rows), bool), {})
        partners = params["mix_partner"].astype(np.int64)
        return _Plan(view, positions, rows, params, partners, partners != rows, self.views.params(view, partners))

    def _render(self, plan: _Plan, i: int, images: _Images) -> RenderedView | MixedView:
        row, other = int(plan.rows[i]), int(plan.partners[i])
        recipe, labels = self.views.recipe, self.views.labels
        params = row_params(plan.params, i)
        partner = None
        if plan.mixed[i]:
            partner = images.decode(other), row_params(plan.partner_params, i)
        pixels = render_view(images.decode(row), params, recipe, self.size, partner)
        if self.transform is not None:
            pixels = self.transform(pixels)
        if not recipe.mixes:
            return RenderedView(pixels, int(labels[row]), row, plan.view)
        weight = np.float32(int(params["mix_weight"]) / WEIGHT_UNIT)
        return MixedView(pixels, int(labels[row]), row, plan.view, other, int(labels[other]), weight)


class _Plan(NamedTuple):
    """The items of a batch that show one view: positions in the batch, rows, partners, and the parameters of both."""

    view: int
    positions: Rows
    rows: Rows
    params: dict[str, npt.NDArray[Any]]
    partners: Rows
    mixed: npt.NDArray[np.bool_]
    partner_params: dict[str, npt.NDArray[Any]]


class _Images:
    """The images of a batch; each is decoded at its first use and freed after its last.

    The bytes of an image are compared with the digest in the index whenever they are read, since a file that changes
    during a run would give the views of another image. Arrays are in memory already.
    """

    def __init__(self, source: Source, views: Views) -> None:
        self.source, self.source_rows, self.digests = source, views.source_rows, views.digests
        self.uses: Counter[int] = Counter()
        self.decoded: dict[int, torch.Tensor] = {}

    def count_uses(self, rows: Rows) -> None:
        self.uses.update(rows.tolist())

    def load(self) -> None:
        """Read together what is not on the disk."""
        if isinstance(self.source, StreamedSource):
            rows = self.source_rows[list(self.uses)]
            self.source = self.source.loaded(rows[rows >= 0].tolist())

    def decode(self, row: int) -> torch.Tensor:
        image = self.decoded.pop(row, None)
        if image is None:
            source_row = int(self.source_rows[row])
            if source_row < 0:
                raise Refused(f"row {row} has no sample in this source; use only the rows of indices(view)")
            sample = self.source.sample(source_row)
            if isinstance(sample.payload, bytes) and sha256(sample.payload).digest() != self.digests[row].tobytes():
                if isinstance(self.source, StreamedSource):
                    self.source.forget(source_row)
                raise Refused(
                    f"image {sample.key!r} has changed since it was indexed; restore it, or start again with the "
                    "images as they are now"
                )
            image = decode_image(sample.payload, name=sample.key, max_pixels=sample.max_pixels)
        self.uses[row] -= 1
        if self.uses[row] > 0:
            self.decoded[row] = image
        return image


def render(
    source: Source | str | Any,  # noqa: ANN401  or any object that `open_source` accepts
    archive: ViewArchive,
    row: int,
    view: int,
    size: int | None = None,
) -> torch.Tensor:
    """One view of an archive as the teacher saw it: uint8 [3, size, size], by default of the recipe's size.

    The image is found by content, so the order of the source does not matter; a changed image is refused. The canaries
    are not checked: `aligned_views` does this for a whole dataset.
    """
    source = in_any_order(open_source(source))
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
    sample = _find_sample(source, archive, row)
    return decode_image(sample.payload, name=sample.key, max_pixels=sample.max_pixels)


def _find_sample(source: Source, archive: ViewArchive, row: int) -> Sample:
    """The sample that the archive's row was made from: looked up by row number, then by key, then by content."""
    key, digest = archive.keys[row], np.asarray(archive.digests[row]).tobytes()
    for candidate in _candidates(source, key, row):
        sample = source.sample(candidate)
        if digest_of(sample.payload, name=sample.key) == digest:
            return sample
    source_row = int(join_archive(source, archive, allow_missing=True).source_row_of_archive_row[row])
    if source_row < 0:
        raise Refused(f"row {row} ({key!r}): the source has no image with the bytes that the archive was made from")
    return source.sample(source_row)


def _candidates(source: Source, key: str, row: int) -> Iterator[int]:
    if row < len(source):
        yield row
    if isinstance(source, ListedSource):
        yield from np.flatnonzero(source.keys.hashes() == pack_keys([key]).hashes()[0]).tolist()
