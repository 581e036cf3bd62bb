"""The index of tars at addresses: keys, labels, digests, and where each image is.

Each tar is read once. Its tables are kept in the cache folder, so that an interrupted pass continues, and those of all
tars of a set together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from redistill_cache.addresses import Address
from redistill_cache.download import is_missing, say
from redistill_cache.errors import Damaged, RedistillError, Refused
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.verified_files import cache_folder

from redistill.sources.base import Sample
from redistill.sources.images import MAX_ENCODED_BYTES, BadImage
from redistill.sources.index import HEADER, ImageTable, load_arrays, read_chunk, save_arrays
from redistill.sources.tar_cache import FETCH_THREADS, FetchThreads, TarCache
from redistill.sources.wds import read_at, scan_tar

__all__ = ["TarKind", "TarTables", "indexed_tars", "read_image", "saved_tables", "shared_tables", "tables_file"]

VERSION = 1
NAMES = ("version", "tar_bytes", "counts", "key_data", "key_offsets", "places", "digests", "sizes", "level")


@dataclass(frozen=True)
class TarKind:
    """What the index of a tar depends on, besides the tar."""

    labelled: bool
    max_pixels: int | None


@dataclass(frozen=True)
class TarTables:
    """Some tars in order, and the samples of all of them."""

    tar_bytes: np.ndarray  # [T] int64
    counts: np.ndarray  # [T] int64: samples of each tar
    keys: PackedKeys
    places: np.ndarray  # [N, 3] int64: offset and size of the image, and the label
    images: ImageTable

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "version": np.array(VERSION),
            "tar_bytes": self.tar_bytes,
            "counts": self.counts,
            "key_data": self.keys.data,
            "key_offsets": self.keys.offsets,
            "places": self.places,
            "digests": self.images.digests,
            "sizes": self.images.sizes,
            "level": self.images.level,
        }


def indexed_tars(addresses: Sequence[Address], kind: TarKind, cache: TarCache) -> TarTables:
    """The tables of the tars; those that are not known yet are read, and kept."""
    known = saved_tables(tables_file(addresses, kind), len(addresses))
    if known is not None:
        return known
    parts = {i: part for i, address in enumerate(addresses) if (part := saved_tables(tables_file([address], kind), 1))}
    todo = [i for i in range(len(addresses)) if i not in parts]
    if todo:
        say(f"reading {len(todo):,} of {len(addresses):,} tars once, to index their images")
    missing: list[Exception] = []

    def read(i: int, stopped: Callable[[], bool]) -> None:
        try:
            parts[i] = _read_tar(addresses[i], kind, cache, stopped)
        except RedistillError as error:
            if not is_missing(error.__cause__):
                raise
            missing.append(error)

    if todo:
        read(todo[0], lambda: False)
        largest = int(parts[todo[0]].tar_bytes[0]) if todo[0] in parts else cache.limit
        with FetchThreads(max(1, min(FETCH_THREADS, cache.limit // (2 * max(1, largest))))) as threads:
            for future in [threads.submit(read, i, threads.stopped) for i in todo[1:]]:
                future.result()
    if missing:
        raise Refused(f"{len(missing):,} of {len(addresses):,} tars are missing; the first: {missing[0]}")
    tables = _joined([parts.pop(i) for i in range(len(addresses))])
    save_arrays(tables_file(addresses, kind), **tables.arrays())
    return tables


def _read_tar(address: Address, kind: TarKind, cache: TarCache, stopped: Callable[[], bool]) -> TarTables:
    """The table of a tar, which is read once: hashed and parsed."""
    with cache.holding(address, stopped) as path:
        try:
            keys, places = scan_tar(path, kind.labelled)
        except Refused as error:
            cache.remove(address)
            raise Refused(str(error).replace(repr(str(path)), str(address))) from error
        source = _OneTar(path, keys, places, kind.max_pixels)
        count = len(keys)
        _, _, _, digests, sizes, bad = read_chunk(source, np.arange(count), HEADER)  # type: ignore[arg-type]  # of a source it only reads samples
        level = np.full(count, HEADER, np.uint8)
        level[list(bad)] = 0
        table = TarTables(
            np.array([path.stat().st_size], np.int64),
            np.array([count], np.int64),
            pack_keys(keys),
            np.array(places, np.int64).reshape(-1, 3),
            ImageTable(digests, sizes, level),
        )
    save_arrays(tables_file([address], kind), **table.arrays())
    return table


class _OneTar:
    """The samples of a tar on the disk."""

    def __init__(self, path: Path, keys: list[str], places: list[tuple[int, int, int]], limit: int | None) -> None:
        self.path, self.keys, self.places, self.limit = path, keys, places, limit

    def sample(self, i: int) -> Sample:
        offset, size, label = self.places[i]
        return Sample(read_image(self.path, self.keys[i], offset, size), label, self.keys[i], self.limit)


def read_image(path: Path, key: str, offset: int, size: int) -> bytes:
    if size > MAX_ENCODED_BYTES:
        raise BadImage(key, f"{size} bytes, more than the limit of {MAX_ENCODED_BYTES}")
    with path.open("rb", buffering=0) as file:
        return read_at(file.fileno(), offset, size)


def tables_file(addresses: Sequence[Address], kind: TarKind) -> Path:
    """Where the tables of these tars are kept together."""
    text = "\0".join([f"{kind.labelled} {kind.max_pixels}", *(address.url for address in addresses)])
    return cache_folder() / "tar-index" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"


def saved_tables(path: Path, tars: int) -> TarTables | None:
    """The tables of so many tars that were saved; None if there are none that can be used."""
    saved = load_arrays(path, NAMES)
    if saved is None:
        return None
    try:
        keys = PackedKeys(saved["key_data"], saved["key_offsets"])
    except (Damaged, ValueError, TypeError):
        return None
    n, names = len(keys), NAMES[1:3] + NAMES[5:]
    expected = [((tars,), "int64"), ((tars,), "int64"), ((n, 3), "int64"), ((n, 32), "uint8"), ((n, 2), "uint32")]
    if [(saved[name].shape, saved[name].dtype.name) for name in names] != [*expected, ((n,), "uint8")]:
        return None
    counts, places = saved["counts"], saved["places"]
    if counts.min(initial=0) < 0 or counts.sum() != n or saved["tar_bytes"].min(initial=1) < 1:
        return None
    ends = places[:, 0] + places[:, 1]
    if places[:, :2].min(initial=0) < 0 or np.any(ends > np.repeat(saved["tar_bytes"], counts)):
        return None
    images = ImageTable(saved["digests"], saved["sizes"], saved["level"])
    return TarTables(saved["tar_bytes"], counts, keys, places, images)


def shared_tables(path: Path, addresses: Sequence[Address]) -> TarTables:
    tables = saved_tables(path, len(addresses))
    if tables is None:
        raise Refused(
            f"expected an index of {len(addresses):,} streamed tars at {path}, found "
            f"{'another file' if path.exists() else 'nothing'}; write it: redistill index 'wds:...?stream=1' --out FILE"
        )
    return tables


def _joined(parts: Sequence[TarTables]) -> TarTables:
    lengths = np.concatenate([np.diff(part.keys.offsets) for part in parts])
    return TarTables(
        np.concatenate([part.tar_bytes for part in parts]),
        np.concatenate([part.counts for part in parts]),
        PackedKeys(
            np.concatenate([part.keys.data for part in parts]),
            np.concatenate([np.zeros(1, np.uint64), np.cumsum(lengths, dtype=np.uint64)]),
        ),
        np.concatenate([part.places for part in parts]),
        ImageTable(*(np.concatenate([getattr(p.images, n) for p in parts]) for n in ("digests", "sizes", "level"))),
    )
