"""Tars that are larger than the disk: `wds:PATTERN?stream=1`, and how `wds:` is opened.

* Tars at addresses are read once, to index them (tar_index.py); `?index=FILE` takes the index from a file that
  `redistill index` has written.
* From then on, each tar is fetched whole when it is used, ahead of use where the order is known, and removed when its
  room is needed: `--stream-cache` bounds the bytes of all of them on this machine. Single images in any order
  (canaries, a pilot) are read without their tars.
* `window=N` tars are used together and have their images mixed (views/stream_order.py); by default as many as 4 GiB
  hold. The cache must hold two windows: one that is used, one that is fetched. Tars on this disk are read in place.
* By default, tars at addresses are streamed if they are larger than --stream-cache, judged by the first one.
  `stream=0` downloads all and keeps them.
* A tar whose size or images are no longer those of the index is refused, and indexed again by the next run.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from itertools import chain
from pathlib import Path
from types import TracebackType

import numpy as np
from redistill_cache.addresses import Address
from redistill_cache.download import say
from redistill_cache.errors import RedistillError, Refused, UsageError
from redistill_cache.wording import human_bytes

from redistill.sources import DEFAULT_STREAM_CACHE
from redistill.sources.base import Sample, pixel_limit, shared_index
from redistill.sources.images import MAX_ENCODED_BYTES, BadImage
from redistill.sources.index import repeats
from redistill.sources.tar_cache import FETCH_THREADS, FetchThreads, Part, TarCache, TarChanged, name_of
from redistill.sources.tar_index import (
    TarKind,
    TarTables,
    indexed_tars,
    read_image,
    saved_tables,
    shared_tables,
    tables_file,
)
from redistill.sources.wds import WdsSource, copy_path, expand_pattern, local_copy, parse_place
from redistill.specs import Spec

__all__ = ["StreamSource", "TarsAhead", "open_wds"]

GIB = 1 << 30
WINDOW_BYTES = 4 * GIB
ATTEMPTS = 5  # to read a tar that other processes remove to make room


def open_wds(spec: Spec, stream_cache: float = DEFAULT_STREAM_CACHE) -> WdsSource | StreamSource:
    """A source from `wds:PATTERN?labels=none&max_pixels=400000000&index=FILE&stream=1&window=8`."""
    spec.refuse_unknown({"labels", "max_pixels", "index", "stream", "window"})
    labels = spec.take("labels", "members")
    if labels not in ("members", "none"):
        raise UsageError(f"{spec.text!r}: expected labels=members or none, found {labels!r}")
    window = spec.take("window", 0)
    if "window" in spec.options and window < 1:
        raise UsageError(f"{spec.text!r}: expected window to be a number of tars, at least 1, found {window}")
    wanted = spec.take("stream", False) if "stream" in spec.options else None
    places = [parse_place(name) for name in expand_pattern(spec)]  # all are valid before one is fetched
    addresses = [place for place in places if isinstance(place, Address)]
    if wanted and 0 < len(addresses) < len(places):
        raise UsageError(f"{spec.text!r}: expected either paths or addresses with stream=1, found both")
    kind = TarKind(labels == "members", pixel_limit(spec))
    index_file, cache = shared_index(spec), TarCache(int(stream_cache * GIB))
    if addresses and (wanted or (wanted is None and _are_too_large(places, kind, cache))):
        tars = shared_tables(index_file, addresses) if index_file is not None else indexed_tars(addresses, kind, cache)
        return StreamSource(addresses, tars, cache, kind, window=window, index_file=index_file, spec=spec.text)
    if window and not wanted:
        raise UsageError(f"{spec.text!r}: window= mixes the images of streamed tars; add stream=1")
    source = WdsSource(
        [local_copy(place) if isinstance(place, Address) else place for place in places],
        labelled=kind.labelled,
        max_pixels=kind.max_pixels,
        index_file=index_file,
        spec=spec.text,
    )
    if wanted:
        source.window = window or _default_window(source.largest_tar)
    return source


def _default_window(largest_tar: int) -> int:
    return max(1, WINDOW_BYTES // max(1, largest_tar))


def _are_too_large(places: Sequence[Address | Path], kind: TarKind, cache: TarCache) -> bool:
    """Whether tars that are all at addresses are larger than the limit, if the others are like the first."""
    addresses = [place for place in places if isinstance(place, Address)]
    if len(addresses) < len(places) or all(copy_path(address).is_file() for address in addresses):
        return False
    known = saved_tables(tables_file(addresses, kind), len(addresses))
    if known is not None:
        return int(known.tar_bytes.sum()) > cache.limit
    first = addresses[0]
    was_kept = copy_path(first).is_file()
    path = local_copy(first)
    too_large = path.stat().st_size * len(addresses) > cache.limit
    if too_large and not was_kept:
        with suppress(OSError):
            cache.folder.mkdir(parents=True, exist_ok=True)
            path.replace(cache.path(first))
    return too_large


class StreamSource:
    """The samples of tars at addresses, of which a part is on the disk."""

    class_names: tuple[str, ...] | None = None

    def __init__(
        self,
        addresses: list[Address],
        tars: TarTables,
        cache: TarCache,
        kind: TarKind,
        *,
        window: int = 0,
        index_file: Path | None = None,
        spec: str,
    ) -> None:
        self.addresses, self.cache, self.kind, self.spec = addresses, cache, kind, spec
        self.keys, self.images, self._places = tars.keys, tars.images, tars.places
        self.labels = np.ascontiguousarray(tars.places[:, 2])
        self.tar_bytes, self._counts = tars.tar_bytes, tars.counts
        self.tar_of = np.repeat(np.arange(len(addresses), dtype=np.int32), tars.counts)
        self.index_file: Path | None = None  # `tars` is what an index file holds
        self._shared = index_file
        self.description = {"kind": "wds"}
        self._in_parts = False
        self._loaded: Mapping[int, bytes] = {}
        if not len(self.keys):
            raise Refused(f"no images in {spec!r}")
        repeated = repeats(self.keys.hashes())
        if len(repeated):
            key, tar = self.keys[int(repeated[0])], addresses[self.tar_of[repeated[0]]]
            raise Refused(f"the key {key!r} in {str(tar)!r} is in an earlier tar, too; make keys unique across tars")
        self.window = window or _default_window(int(self.tar_bytes.max()))
        self._refuse_small_cache()

    def _refuse_small_cache(self) -> None:
        limit, largest_first = self.cache.limit, np.cumsum(np.sort(self.tar_bytes)[::-1])
        two = int(largest_first[min(2 * self.window, len(largest_first)) - 1])
        if two <= limit:
            return
        fits = int(np.searchsorted(largest_first, limit, "right")) // 2
        advice = f"add window={fits}, or allow" if fits else "allow"
        raise Refused(
            f"{self.spec!r}: two windows of {self.window} tars have up to {human_bytes(two)}, and --stream-cache is "
            f"{human_bytes(limit)}; {advice} at least {two / GIB:.3g} GiB"
        )

    @property
    def location(self) -> str:
        return "\0".join([f"stream:{self.kind}", *(address.url for address in self.addresses)])

    def __len__(self) -> int:
        return len(self.keys)

    def stamps(self) -> np.ndarray:
        """The size of each sample's tar, and a number that depends on what was in it when it was indexed."""
        ends = np.cumsum(self._counts)
        by_tar = np.zeros((len(self.addresses), 4), np.int64)
        by_tar[:, 0] = self.tar_bytes
        for number, (start, end) in enumerate(zip(ends - self._counts, ends, strict=True)):
            digest = hashlib.sha256(self.images.digests[start:end].tobytes()).digest()
            by_tar[number, 3] = int.from_bytes(digest[:7], "big")
        return by_tar[self.tar_of]

    def tar_arrays(self) -> dict[str, np.ndarray]:
        return {"tar_bytes": self.tar_bytes, "counts": self._counts, "places": self._places}

    def sample(self, i: int) -> Sample:
        key, payload = self.keys[i], self._loaded.get(i)
        if payload is None:
            payload = self._payload(i, key)
        return Sample(payload, int(self.labels[i]), key, self.kind.max_pixels)

    def _payload(self, i: int, key: str) -> bytes:
        tar, (offset, size) = int(self.tar_of[i]), self._places[i, :2].tolist()
        path = self.cache.path(self.addresses[tar])
        for _ in range(ATTEMPTS):
            try:
                return read_image(path, key, offset, size)
            except FileNotFoundError:
                if self._in_parts:
                    break
                self.fetch(tar)
            except OSError as error:
                raise BadImage(key, f"{str(path)!r}: {error.strerror or error}") from error
        return self._read_parts([i])[0]

    def fetch(self, tar: int, **options: object) -> None:
        """Fetch a tar unless it is here; the options are those of `TarCache.fetch`."""
        try:
            self.cache.fetch(self.addresses[tar], int(self.tar_bytes[tar]), **options)  # type: ignore[arg-type]  # passed on
        except TarChanged as error:
            raise self._changed(tar, str(error)) from error

    def _read_parts(self, samples: Sequence[int]) -> list[bytes]:
        for i in samples:
            if self._places[i, 1] > MAX_ENCODED_BYTES:
                raise BadImage(self.keys[i], f"{self._places[i, 1]} bytes, more than the limit of {MAX_ENCODED_BYTES}")
        parts = []
        for i in samples:
            tar, (offset, size) = int(self.tar_of[i]), self._places[i, :2].tolist()
            parts.append(Part(self.addresses[tar], int(self.tar_bytes[tar]), offset, size))
        try:
            return self.cache.read(parts)
        except TarChanged as error:
            changed = next(tar for tar in self.tar_of[samples] if str(error).startswith(f"{self.addresses[tar]}: "))
            raise self._changed(int(changed), str(error)) from error

    def by_parts(self) -> StreamSource:
        other = copy(self)
        other._in_parts = True
        return other

    def loaded(self, samples: Sequence[int]) -> StreamSource:
        """With the samples in memory whose tars are not here; this source itself, unless it reads parts of tars."""
        if not self._in_parts:
            return self
        here = {tar: self.cache.path(self.addresses[tar]).is_file() for tar in {int(self.tar_of[i]) for i in samples}}
        todo = [i for i in dict.fromkeys(map(int, samples)) if not here[int(self.tar_of[i])] and i not in self._loaded]
        other = copy(self)
        other._loaded = dict(zip(todo, self._read_parts(todo), strict=True)) if todo else self._loaded
        return other

    def forget(self, i: int) -> None:
        """The sample is not the one that was indexed."""
        self._forget(int(self.tar_of[i]))

    def _forget(self, tar: int) -> None:
        self.cache.remove(self.addresses[tar])
        for path in (tables_file([self.addresses[tar]], self.kind), tables_file(self.addresses, self.kind)):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _changed(self, tar: int, what: str) -> Refused:
        self._forget(tar)
        again = "start the run again" if self._shared is None else f"write the index {self._shared} again"
        return Refused(f"{what}; {again} with the tars as they are now, or restore the tar")


# -- fetching ahead ---------------------------------------------------------------------------------------------------


class TarsAhead:
    """Fetches tars of a streamed source group by group: those that are used, and those of the next group. Where batches
    of later groups are loaded ahead, theirs as well, as far as they fit.

    A tar that cannot be fetched here is fetched where it is used, and if that fails, its error ends the run there.
    """

    def __init__(self, source: object, groups: Iterable[Sequence[int]]) -> None:
        """The groups of tar numbers in the order of their use; a source that is on the disk needs none."""
        self.source = source if isinstance(source, StreamSource) else None
        self._groups: Iterator[Sequence[int]] = iter(groups if self.source is not None else ())
        self._threads = FetchThreads(FETCH_THREADS if self.source is not None else 1)
        self._kept: deque[Sequence[int]] = deque([()])  # the group that is used, and those that are fetched after it
        self._following: Sequence[int] | None = None
        self._keep: frozenset[str] = frozenset()
        self._has_told = False
        self.number = -1
        """Of the group that is used."""
        self.enter(0)

    @property
    def fetches(self) -> bool:
        """Whether there is anything to fetch."""
        return self.source is not None

    def __enter__(self) -> TarsAhead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._threads.__exit__(kind, error, _)

    def enter(self, number: int) -> None:
        """From now on, group `number` is used, and no earlier one."""
        while self.source is not None and self.number < number:
            self.number += 1
            self._kept.popleft()
            while len(self._kept) < 2:
                self._fetch_next(self.source)

    def expect(self, number: int) -> None:
        """Group `number` is about to be used, while earlier ones still are."""
        while self.source is not None and self.number + len(self._kept) <= number:
            tars = list({*chain(*self._kept), *self._peek()})
            needed = int(self.source.tar_bytes[tars].sum())
            if needed > self.source.cache.limit:
                self._tell_small(self.source, needed)
                return
            self._fetch_next(self.source)

    def _peek(self) -> Sequence[int]:
        if self._following is None:
            self._following = list(next(self._groups, ()))
        return self._following

    def _fetch_next(self, source: StreamSource) -> None:
        group, self._following = self._peek(), None
        self._kept.append(group)
        in_use = [source.addresses[tar] for tar in chain(*reversed(self._kept))]
        self._keep = frozenset(map(name_of, in_use))
        source.cache.touch(in_use)  # other processes remove these last
        for tar in group:
            self._threads.submit(self._fetch, tar)

    def _tell_small(self, source: StreamSource, needed: int) -> None:
        if not self._has_told:
            self._has_told = True
            say(
                f"{source.spec!r}: the batches that are loaded ahead need tars of {human_bytes(needed)}, and "
                f"--stream-cache is {human_bytes(source.cache.limit)}, so tars are fetched more than once; allow more, "
                "or use fewer --workers"
            )

    def _fetch(self, tar: int) -> None:
        assert self.source is not None
        name = name_of(self.source.addresses[tar])
        with suppress(RedistillError, OSError):
            self.source.fetch(
                tar,
                keep=lambda: self._keep,
                waits=False,
                stopped=lambda: self._threads.stopped() or name not in self._keep,  # its group is over
            )
