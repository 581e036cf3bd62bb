"""The views of an archive, rendered from local images and compared with the views its teacher was run on.

views = aligned_views("folder:imagenet/train", open_archive("teacher.redistill.zarr"))
views.alignment.require()
views.dataset                                     # a ViewDataset: pixels, label, row, view
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from redistill.sources.index import index_source
from redistill.sources.join import Join
from redistill.sources.open_source import open_source
from redistill.views.canaries import Alignment, CanaryArchive, check_canaries
from redistill.views.dataset import ViewDataset
from redistill.views.view_params import excluded_keys, join_archive

__all__ = ["AlignedViews", "aligned_views"]


@dataclass(frozen=True)
class AlignedViews:
    """A dataset of an archive's views, with the join and the canary check that it rests on."""

    dataset: ViewDataset
    joined: Join
    canaries: Alignment | None
    """None if the archive has no canaries."""
    excluded: int = 0
    """Images of the data that the archive excludes."""
    hashed: int = 0
    """Images of the data that were read and hashed now."""

    @property
    def alignment(self) -> Alignment:
        return self.canaries or Alignment("no canaries", 0.0, 0)


def aligned_views(
    data: Any,  # noqa: ANN401  a spec string, a path, or any object that `open_source` accepts
    archive: CanaryArchive,
    *,
    size: int | None = None,
    allow_missing: bool = False,
    workers: int | None = None,
    reuse: bool = True,
    progress: Callable[[int, int], None] | None = None,
    views: Sequence[int] | None = None,
) -> AlignedViews:
    """Open and index `data`, match its images to the rows of `archive`, and re-create the archive's canaries.

    `size` is the side of the rendered views, by default the recipe's. `workers`, `reuse` and `progress` are for
    indexing; without `reuse`, all images are read anew. `views` are those whose canaries are compared, by default all.
    """
    source = open_source(data)
    index = index_source(source, workers=workers, progress=progress, without=excluded_keys(archive), reuse=reuse)
    joined = join_archive(index, archive, allow_missing=allow_missing)
    dataset = ViewDataset(source, archive, size=size, joined=joined, check=False)
    canaries = check_canaries(dataset, archive, views=views) if archive.spec.canaries_per_view else None
    return AlignedViews(dataset, joined, canaries, excluded=len(index.excluded), hashed=len(source) - index.reused)
