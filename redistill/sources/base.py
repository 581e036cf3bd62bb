"""Sources: indexable image sets whose samples have a key, a label and bytes that can be hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from redistill_cache.errors import UsageError
from redistill_cache.keys import PackedKeys

from redistill.sources.images import as_pixels
from redistill.specs import Spec

__all__ = [
    "NO_FILE",
    "NO_LABEL",
    "FileStamp",
    "ListedSource",
    "ObjectSource",
    "Sample",
    "Source",
    "StreamedSource",
    "digest_of",
    "file_stamp",
    "in_any_order",
    "local_path",
    "pixel_limit",
    "shared_index",
    "streamed",
]

NO_LABEL = -1


@dataclass(frozen=True)
class Sample:
    """One image as stored: encoded bytes, or a uint8 array [height, width, channels]."""

    payload: bytes | np.ndarray
    label: int
    key: str
    max_pixels: int | None = None
    """The number of pixels that the user allows for an encoded image; None for the limits of `images`."""


@runtime_checkable
class Source(Protocol):
    """N samples by index. The index may differ on another machine; the key and the digest do not."""

    @property
    def spec(self) -> str:
        """The spec string the source was opened from; may hold a path."""

    @property
    def description(self) -> Mapping[str, Any]:
        """What archives record about the source: plain JSON, never a path."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names by label; None for a source without class names."""

    def __len__(self) -> int: ...

    def sample(self, i: int) -> Sample:
        """Sample `i`: the same bytes on every call, in any order."""


@runtime_checkable
class ListedSource(Source, Protocol):
    """A source with keys and labels that need no read of a sample, and with stamps that show changed files."""

    keys: PackedKeys
    labels: np.ndarray
    index_file: Path | None
    """An index that `redistill index` has written, beside that in the cache folder."""

    @property
    def location(self) -> str:
        """Identifies the source in the cache of indexes."""

    def stamps(self) -> np.ndarray:
        """The `file_stamp` of each sample's file, int64 [N, 4]; -1 if it is missing."""


@runtime_checkable
class StreamedSource(ListedSource, Protocol):
    """Tars that are used one group after another, since they need not be on the disk together."""

    tar_of: np.ndarray
    """[N] int32: the number of the tar of each sample."""
    window: int
    """How many tars are used together and have their samples mixed; 0: all, in any order."""

    def by_parts(self) -> StreamedSource:
        """The same samples for use in any order: of tars that are not here, only these samples are read."""

    def loaded(self, samples: Sequence[int]) -> StreamedSource:
        """The same source with these samples in memory, if they are to be read in parts."""

    def forget(self, i: int) -> None:
        """The sample is not the one that was indexed: index its tar again when the source is opened again."""


def streamed(source: object) -> StreamedSource | None:
    """The source, if it is one of tars that are used one group after another."""
    return source if isinstance(source, StreamedSource) and source.window > 0 else None


def in_any_order(source: Source) -> Source:
    """The source for few samples, in any order: their tars are not fetched for them."""
    return source.by_parts() if isinstance(source, StreamedSource) else source


FileStamp = tuple[int, int, int, int]
NO_FILE: FileStamp = (-1, -1, -1, -1)


def file_stamp(status: os.stat_result) -> FileStamp:
    """Size, modification time, change time and inode: a program can set the modification time back, no other."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def digest_of(payload: bytes | np.ndarray, *, name: str) -> bytes:
    """sha256 of the encoded bytes; for an array, of `uint8[H,W,C]` in ASCII followed by its values in C order."""
    if isinstance(payload, np.ndarray):
        pixels_HWC = as_pixels(payload, name=name)
        shape = ",".join(map(str, pixels_HWC.shape))
        return hashlib.sha256(f"uint8[{shape}]".encode() + pixels_HWC.tobytes()).digest()
    return hashlib.sha256(payload).digest()


def pixel_limit(spec: Spec) -> int | None:
    """The option `max_pixels` of a source of encoded images."""
    if "max_pixels" not in spec.options:
        return None
    limit = spec.take("max_pixels", 0)
    if limit < 1:
        raise UsageError(f"{spec.text!r}: expected max_pixels to be at least 1, found {limit}")
    return limit


def shared_index(spec: Spec) -> Path | None:
    """The option `index` of a source of files."""
    return local_path(spec.take("index", "")) if "index" in spec.options else None


def local_path(text: str) -> Path:
    """A path on this machine, with `~` for a home directory."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{text!r}: the home directory is not known; write out the path") from error


class ObjectSource:
    """A source around any object with `__len__` and `sample(i) -> (bytes or array, label, key)`."""

    def __init__(self, samples: Any) -> None:  # noqa: ANN401  any object of this shape
        if not callable(getattr(samples, "sample", None)) or not hasattr(samples, "__len__"):
            raise UsageError(
                "expected a spec string such as 'folder:PATH', or an object with __len__ and "
                f"sample(i) -> (bytes or array, label, key), found {type(samples).__name__}"
            )
        self.samples = samples
        names = getattr(samples, "class_names", None)
        self.class_names: tuple[str, ...] | None = None if names is None else tuple(map(str, names))
        self.spec = f"object:{type(samples).__name__}"
        self.description: Mapping[str, Any] = {"kind": "object"}

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        item = self.samples.sample(i)
        if isinstance(item, Sample):
            return item
        try:
            payload, label, key = item
            label = int(label)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"expected sample({i}) of {type(self.samples).__name__} to be (bytes or array, label, key)"
            ) from error
        if isinstance(payload, bytearray | memoryview):
            payload = bytes(payload)
        if not isinstance(payload, bytes | np.ndarray) or not isinstance(key, str):
            kinds = f"({type(payload).__name__}, label, {type(key).__name__})"
            raise UsageError(f"expected sample({i}) to be (bytes or numpy array, label, str), found {kinds}")
        return Sample(payload, label, key)
