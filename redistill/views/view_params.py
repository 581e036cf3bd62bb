"""The parameters of views: drawn from a recipe (stage 1), or read from an archive (stage 2).

The dataset and the canaries depend on `Views` only, so both stages render with the same code.
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

__all__ = [
    "ArchiveViews",
    "DrawnViews",
    "ViewArchive",
    "Views",
    "archive_recipe",
    "excluded_keys",
    "join_archive",
    "usable_rows",
]

Params = dict[str, npt.NDArray[Any]]
Rows = npt.NDArray[np.int64]

CACHED_VIEWS = 2  # per process: the view of this epoch, and that of the next


@runtime_checkable
class Views(Protocol):
    """The views of N rows: their parameters, labels, and the sample of the source behind each row."""

    recipe: Recipe
    num_views: int
    labels: Rows
    source_rows: Rows
    """[N]: the index of the row's sample in the source, -1 if the source lacks it."""
    digests: npt.NDArray[np.uint8]
    """[N, 32]: SHA-256 of the row's encoded image."""

    def params(self, view: int, rows: Rows) -> Params:
        """The stored parameters of one view of some rows."""


class ViewArchive(Protocol):
    """The part of an opened archive that views need."""

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
    """Views drawn on demand, for the rows of a source's index."""

    def __init__(self, index: SourceIndex, recipe: Recipe, *, seed: int, num_views: int) -> None:
        self.recipe, self.seed, self.num_views = recipe, seed, num_views
        self.labels: Rows = np.asarray(index.labels, np.int64)
        self.source_rows: Rows = np.asarray(index.rows, np.int64)
        self.digests = index.digests
        self.sizes = index.sizes

    def params(self, view: int, rows: Rows) -> Params:
        return draw_params(self.recipe, self.seed, view, rows, self.sizes[rows], len(self.source_rows))


class ArchiveViews:
    """The views of an archive joined to a source. Each process caches the parameters of the last views it used."""

    def __init__(self, archive: ViewArchive, joined: Join) -> None:
        self.archive = archive
        self.recipe = archive_recipe(archive)
        self.num_views = archive.num_views
        self.labels: Rows = np.asarray(archive.labels, np.int64)
        self.source_rows: Rows = np.asarray(joined.source_row_of_archive_row, np.int64)
        self.digests = np.asarray(archive.digests)
        if len(self.source_rows) != archive.num_samples:
            rows = len(self.source_rows)
            raise Refused(f"expected a join of the archive's {archive.num_samples} rows, found {rows}; join again")
        self._cached: OrderedDict[int, Params] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": OrderedDict()}  # a worker reads the views it needs

    def params(self, view: int, rows: Rows) -> Params:
        whole = self._cached.get(view)
        if whole is None:
            whole = self._cached[view] = self._read(view)
            while len(self._cached) > CACHED_VIEWS:
                self._cached.popitem(last=False)
        self._cached.move_to_end(view)
        return {name: values[rows] for name, values in whole.items()}

    def _read(self, view: int) -> Params:
        params = {name: np.asarray(values) for name, values in self.archive.view_params(view).items()}
        if self.recipe.mixes and params["mix_partner"].max(initial=0) >= self.archive.num_samples:
            raise Damaged(f"view {view} has mixing partners beyond the {self.archive.num_samples} rows of the archive")
        return params


def archive_recipe(archive: ViewArchive) -> Recipe:
    """The recipe of an archive; refused unless the archive holds exactly the parameter arrays the recipe needs."""
    recipe = Recipe.from_json(archive.spec.recipe)
    expected = {(array.name, np.dtype(array.dtype), tuple(array.row_shape)) for array in recipe.arrays()}
    actual = {(array.name, np.dtype(array.dtype), tuple(array.row_shape)) for array in archive.spec.view_arrays}
    if expected != actual:
        names = ", ".join(sorted(f"{name} {kind}{list(shape)}" for name, kind, shape in expected ^ actual))
        raise Refused(f"the archive's view parameters do not match its recipe; they differ in {names}")
    return recipe


def join_archive(images: Source | SourceIndex, archive: ViewArchive, *, allow_missing: bool = False) -> Join:
    """Find the sample behind each row of the archive, in a source (which is indexed first) or in its index."""
    return join(
        images if isinstance(images, SourceIndex) else index_source(images, without=excluded_keys(archive)),
        keys=archive.keys,
        labels=np.asarray(archive.labels),
        digests=np.asarray(archive.digests),
        class_names=archive.class_names,
        allow_missing=allow_missing,
    )


def excluded_keys(archive: ViewArchive) -> tuple[str, ...]:
    """The keys of the images that the archive leaves out: bad ones, when its teacher was run."""
    return tuple(item["key"] for item in archive.spec.excluded)


def usable_rows(views: Views, view: int) -> Rows:
    """The rows whose view can be rendered: the source has their sample, and that of the row mixed in."""
    if not 0 <= view < views.num_views:
        raise OutOfRange(f"expected a view in [0, {views.num_views}), found {view}")
    present = views.source_rows >= 0
    if views.recipe.mixes and not present.all():
        present = present & present[views.params(view, np.arange(len(present)))["mix_partner"]]
    return np.flatnonzero(present)
