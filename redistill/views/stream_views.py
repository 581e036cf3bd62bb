"""`webdataset_views`: the views of an archive as a webdataset pipeline, for loops that are composed of its stages.

Only the stages between the list of tars and the samples differ from webdataset's own: tars are local files, or are
fetched into the bounded cache of streamed tars, so no address starts a program; members other than images are never
read, and nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from redistill_cache.addresses import Address
from redistill_cache.errors import Damaged, OutOfRange, Refused
from redistill_cache.keys import PackedKeys, pack_keys
from torch import Tensor

from redistill.sources import DEFAULT_STREAM_CACHE
from redistill.sources.images import decode_image
from redistill.sources.tar import members
from redistill.sources.tar_cache import TarCache
from redistill.sources.wds import IMAGES, expand_pattern, parse_place
from redistill.specs import Spec
from redistill.views.canaries import CanaryArchive, fingerprint
from redistill.views.fingerprint import distance
from redistill.views.render import render_view, row_params
from redistill.views.view_params import archive_recipe, excluded_keys

__all__ = ["webdataset_views"]

CHECKED = 16  # canaries, of those that come first


def webdataset_views(
    urls: str | Sequence[str],
    archive: CanaryArchive,
    view: int = 0,
    size: int | None = None,
    *,
    allow_missing: bool = False,
    stream_cache: float = DEFAULT_STREAM_CACHE,
) -> Any:  # noqa: ANN401  a webdataset.DataPipeline with its fluid interface
    """(pixels, label, row) of one view of every image of these tars, in their order, as a webdataset pipeline.

        pipeline = redistill.webdataset_views("train-{0000..0146}.tar", archive, view=epoch % archive.num_views)
        loader = DataLoader(pipeline.shuffle(1000).batched(64), batch_size=None, num_workers=8)

    `urls` is a pattern as after `wds:`, or a list of paths and addresses: http(s), s3, gs or hf. Tars at addresses take
    up to `stream_cache` GiB of the cache folder. Tars are divided over nodes and workers as webdataset does it.
    Rows are found by key, and each image must have the bytes that the archive was made from. One that the archive
    lacks is refused, or skipped with `allow_missing`. The first canaries that come are compared with the archive's.
    """
    import webdataset  # here, as few loops need it
    from webdataset.compat import FluidWrapper
    from webdataset.tariterators import group_by_keys

    recipe = archive_recipe(archive)
    if recipe.mixes:
        raise Refused("the recipe of the archive mixes images, which come from two tars; use a ViewDataset")
    if not 0 <= view < archive.num_views:
        raise OutOfRange(f"expected a view in [0, {archive.num_views}), found {view}")
    names = expand_pattern(Spec("wds", urls, text=urls)) if isinstance(urls, str) else list(urls)
    places = {name: parse_place(name) for name in names}
    views = _Views(archive, view, recipe.size if size is None else size, allow_missing=allow_missing)
    return FluidWrapper(webdataset.SimpleShardList(names)).compose(
        webdataset.split_by_node,
        webdataset.split_by_worker,
        _Tars(places, TarCache(int(stream_cache * (1 << 30)))),
        group_by_keys,
        views,
    )


class _Tars:
    """From tars to their images: {fname, data, __url__}, and {} at the end of each tar."""

    def __init__(self, places: Mapping[str, Address | Path], cache: TarCache) -> None:
        self.places, self.cache = places, cache

    def __call__(self, tars: Iterator[dict[str, str]]) -> Iterator[dict[str, Any]]:
        from webdataset.tariterators import tar_file_expander

        for tar in tars:
            place = self.places[tar["url"]]
            path = self.cache.fetch(place) if isinstance(place, Address) else place
            for _ in members(path, str(place)):
                pass  # refuses what is not a whole, plain tar
            with path.open("rb") as stream:
                yield from tar_file_expander([{"url": str(place), "stream": stream}], select_files=_is_image)


def _is_image(name: str) -> bool:
    return name.rpartition("/")[2].partition(".")[2].lower() in IMAGES


class _Views:
    """From the images of tars to (pixels, label, row)."""

    def __init__(self, archive: CanaryArchive, view: int, size: int, *, allow_missing: bool) -> None:
        self.archive, self.view, self.size, self.allow_missing = archive, view, size, allow_missing

    def __call__(self, samples: Iterator[dict[str, Any]]) -> Iterator[tuple[Tensor, int, int]]:
        archive, recipe = self.archive, archive_recipe(self.archive)
        rows, params = _Rows(archive), archive.view_params(self.view)
        labels, digests = np.asarray(archive.labels), np.asarray(archive.digests)
        check = _CanaryCheck(archive, self.view) if archive.spec.canaries_per_view else None
        for sample in samples:
            where = f"the sample {sample['__key__']!r} in {sample['__url__']}"
            found = [kind for kind in IMAGES if kind in sample]
            if len(found) != 1:
                raise Refused(f"{where} has {len(found)} images; expected one of {', '.join(IMAGES)}")
            payload = sample[found[0]]
            row = rows.find(sample["__key__"], found[0])
            if row is None:
                if self.allow_missing or rows.is_excluded(sample["__key__"], found[0]):
                    continue
                raise Refused(f"{where}: the archive has no such key; use its tars, or pass allow_missing=True")
            if sha256(payload).digest() != digests[row].tobytes():
                raise Refused(f"{where} is not the image that the archive was made from; use the same tars")
            image, of_row = decode_image(payload, name=sample["__key__"]), row_params(params, row)
            if check is not None and check.wants(row):
                check.add(row, render_view(image, of_row, recipe, recipe.size, None), of_row["crop"], recipe.size)
            yield render_view(image, of_row, recipe, self.size, None), int(labels[row]), row


class _Rows:
    """Rows by key. A source of files has the kind of the image in its keys, tars do not."""

    def __init__(self, archive: CanaryArchive) -> None:
        keys = archive.keys
        self.keys = keys if isinstance(keys, PackedKeys) else pack_keys(keys)
        hashes = self.keys.hashes()
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]
        self.excluded = set(excluded_keys(archive))

    def find(self, key: str, kind: str) -> int | None:
        wanted = [key, f"{key}.{kind}"]
        for name, value in zip(wanted, pack_keys(wanted).hashes(), strict=True):
            at = int(np.searchsorted(self.hashes, value))
            while at < len(self.hashes) and self.hashes[at] == value:
                if self.keys[int(self.order[at])] == name:
                    return int(self.order[at])
                at += 1
        return None

    def is_excluded(self, key: str, kind: str) -> bool:
        return not self.excluded.isdisjoint((key, f"{key}.{kind}"))


class _CanaryCheck:
    """Compares the first canaries of a view that come, once there are enough of them."""

    def __init__(self, archive: CanaryArchive, view: int) -> None:
        rows, pixels = archive.canaries(view)
        if len(rows) and int(rows.max()) >= archive.num_samples:
            raise Damaged(f"a canary of view {view} is row {rows.max()}, beyond the {archive.num_samples} rows")
        self.stored = dict(zip(rows.tolist(), pixels, strict=True))
        self.enough = min(CHECKED, len(self.stored))
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.sides: list[float] = []

    def wants(self, row: int) -> bool:
        return row in self.stored and len(self.pairs) < self.enough

    def add(self, row: int, pixels: Tensor, crop: np.ndarray, size: int) -> None:
        self.pairs.append((self.stored[row], fingerprint(pixels)))
        self.sides += [float(side) / size for side in crop[2:]]
        if len(self.pairs) < self.enough:
            return
        expected, rendered = (np.stack(side) for side in zip(*self.pairs, strict=True))
        if np.array_equal(expected, rendered):
            return
        reason = distance(expected, rendered, reduction=float(np.median(self.sides))).mismatch()
        if reason is not None:
            raise Refused(
                f"views do not match the archive: {reason}; use the version of the recipe that it was made with"
            )
