"""Where the parameters of views come from: freshly drawn (stage 1), or read from an archive (stage 2).

Rendering and the dataset need no more than `Views`; that the two stages share it is what makes them show the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from redistill_cache.errors import Damaged, OutOfRange, Refused

from redistill.sources.base import Source
from redistill.sources.index import SourceIndex, index_source
from redistill.sources.join import Join, join
from redistill.views.draw import draw_params
from redistill.views.recipe import Recipe

__all__ = ["ArchiveViews", "DrawnViews", "ViewArchive", "Views", "archive_recipe", "join_archive", "usable_rows"]

Params = dict[str, npt.NDArray[Any]]
Rows = npt.NDArray[np.int64]

KEPT_VIEWS = 2  # whole views a process keeps the parameters of: that of this epoch, and of the one that begins


@runtime_checkable
class Views(Protocol):
    """The views of N rows: what is drawn for each, its label, and which sample of the source it is made from."""

    recipe: Recipe
    num_views: int
    labels: Rows
    source_rows: Rows
    """[N]: the number of the row's sample in its source; -1 where the source has none."""

    def params(self, view: int, rows: Rows) -> Params:
        """The stored parameters of one view of some rows."""


class ViewArchive(Protocol):
    """What is used of an opened archive."""

    @property
    def spec(self) -> Any: ...  # noqa: ANN401  an ArchiveSpec
    @property
    def num_samples(self) -> int: ...
    @property
    def num_views(self) -> int: ...
    @property
    def class_names(self) -> Any: ...  # noqa: ANN401  names or None
    @property
    def keys(self) -> Any: ...  # noqa: ANN401  a sequence of text
    @property
    def labels(self) -> npt.NDArray[Any]: ...
    @property
    def digests(self) -> npt.NDArray[Any]: ...
    def view_params(self, view: int, rows: Any = None) -> Mapping[str, npt.NDArray[Any]]: ...  # noqa: ANN401


class DrawnViews:
    """Views drawn on the spot. The rows are those of a source's index, all of which have their sample."""

    def __init__(self, index: SourceIndex, recipe: Recipe, *, seed: int, num_views: int) -> None:
        self.recipe, self.seed, self.num_views = recipe, seed, num_views
        self.labels: Rows = np.asarray(index.labels, np.int64)
        self.source_rows: Rows = np.asarray(index.rows, np.int64)
        self.sizes = index.sizes

    def params(self, view: int, rows: Rows) -> Params:
        return draw_params(self.recipe, self.seed, view, rows, self.sizes[rows], len(self.source_rows))


class ArchiveViews:
    """The views of an archive, joined to a source. A process reads the parameters of a view once and keeps them."""

    def __init__(self, archive: ViewArchive, joined: Join) -> None:
        self.archive = archive
        self.recipe = archive_recipe(archive)
        self.num_views = archive.num_views
        self.labels: Rows = np.asarray(archive.labels, np.int64)
        self.source_rows: Rows = np.asarray(joined.source_row_of_archive_row, np.int64)
        if len(self.source_rows) != archive.num_samples:
            raise Refused(f"the join has {len(self.source_rows)} rows, the archive {archive.num_samples}; join again")
        self._kept: OrderedDict[int, Params] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": OrderedDict()}  # a worker reads what it needs itself

    def params(self, view: int, rows: Rows) -> Params:
        whole = self._kept.get(view)
        if whole is None:
            whole = self._kept[view] = self._read(view)
            while len(self._kept) > KEPT_VIEWS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(view)
        return {name: values[rows] for name, values in whole.items()}

    def _read(self, view: int) -> Params:
        params = {name: np.asarray(values) for name, values in self.archive.view_params(view).items()}
        if self.recipe.mixes and params["mix_partner"].max(initial=0) >= self.archive.num_samples:
            raise Damaged(
                f"view {view} names mixing partners beyond the {self.archive.num_samples} rows of the archive"
            )
        return params


def archive_recipe(archive: ViewArchive) -> Recipe:
    """The recipe an archive declares; refused unless the archive holds exactly the parameters the recipe needs."""
    recipe = Recipe.from_json(archive.spec.recipe)
    wanted = {(array.name, np.dtype(array.dtype), tuple(array.row_shape)) for array in recipe.arrays()}
    found = {(array.name, np.dtype(array.dtype), tuple(array.row_shape)) for array in archive.spec.view_arrays}
    if wanted != found:
        names = ", ".join(sorted(f"{name} {kind}{list(shape)}" for name, kind, shape in wanted ^ found))
        raise Refused(f"the archive's view parameters are not those of its recipe; they differ in {names}")
    return recipe


def join_archive(images: Source | SourceIndex, archive: ViewArchive, *, allow_missing: bool = False) -> Join:
    """The sample behind each row of the archive; of a source, its index is made or taken up first."""
    return join(
        images if isinstance(images, SourceIndex) else index_source(images),
        keys=archive.keys,
        labels=np.asarray(archive.labels),
        digests=np.asarray(archive.digests),
        class_names=archive.class_names,
        allow_missing=allow_missing,
    )


def usable_rows(views: Views, view: int) -> Rows:
    """The rows whose view can be rendered: their sample is there, and that of the row mixed into it."""
    if not 0 <= view < views.num_views:
        raise OutOfRange(f"expected a view in [0, {views.num_views}), found {view}")
    here = views.source_rows >= 0
    if views.recipe.mixes:
        here = here & here[views.params(view, np.arange(len(here)))["mix_partner"]]
    return np.flatnonzero(here)
