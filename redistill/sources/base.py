"""What a source is: an indexable image set whose samples have a key, a label and bytes that can be hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from redistill_cache.errors import UsageError
from redistill_cache.keys import PackedKeys

from redistill.sources.images import as_pixels

__all__ = ["NO_LABEL", "ListedSource", "ObjectSource", "Sample", "Source", "digest_of"]

NO_LABEL = -1


@dataclass(frozen=True)
class Sample:
    """One image as it is stored: encoded bytes, or a uint8 array [height, width, channels]."""

    payload: bytes | np.ndarray
    label: int
    key: str


@runtime_checkable
class Source(Protocol):
    """N samples by number. The number is only a place; the key and the digest are what stays the same elsewhere."""

    @property
    def spec(self) -> str:
        """How the user named it; may hold a path."""

    @property
    def description(self) -> Mapping[str, Any]:
        """What an archive may say about it: plain JSON, never a path."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names by label, where the source knows them."""

    def __len__(self) -> int: ...

    def sample(self, i: int) -> Sample:
        """Sample `i`; the same bytes however often and in whatever order it is asked for."""


@runtime_checkable
class ListedSource(Source, Protocol):
    """A source that knows keys and labels without reading a sample, and can tell which files changed since."""

    keys: PackedKeys
    labels: np.ndarray

    @property
    def location(self) -> str:
        """What the cached index is filed under."""

    def stamps(self) -> np.ndarray:
        """Size and modification time (ns) of the file behind each sample, int64 [N, 2]; a missing file is -1, -1."""


def digest_of(payload: bytes | np.ndarray, *, name: str) -> bytes:
    """sha256 of the encoded bytes; for an array, of `uint8[H,W,C]` in ASCII followed by its bytes in C order."""
    if isinstance(payload, np.ndarray):
        pixels_HWC = as_pixels(payload, name=name)
        shape = ",".join(map(str, pixels_HWC.shape))
        return hashlib.sha256(f"uint8[{shape}]".encode() + pixels_HWC.tobytes()).digest()
    return hashlib.sha256(payload).digest()


class ObjectSource:
    """A source around any object with `__len__` and `sample(i) -> (bytes or array, label, key)`."""

    def __init__(self, samples: Any) -> None:  # noqa: ANN401  that is the point: anything of this shape
        if not callable(getattr(samples, "sample", None)) or not hasattr(samples, "__len__"):
            raise UsageError(
                f"a {type(samples).__name__} is not a source: expected a spec string such as 'folder:PATH', or an "
                "object with __len__ and sample(i) -> (bytes or array, label, key)"
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
        found = self.samples.sample(i)
        if isinstance(found, Sample):
            return found
        try:
            payload, label, key = found
            label = int(label)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"sample({i}) of a {type(self.samples).__name__} must be (bytes or array, label, key)"
            ) from error
        if isinstance(payload, bytearray | memoryview):
            payload = bytes(payload)
        if not isinstance(payload, bytes | np.ndarray) or not isinstance(key, str):
            kinds = f"({type(payload).__name__}, label, {type(key).__name__})"
            raise UsageError(f"sample({i}) must be (bytes or numpy array, label, str), found {kinds}")
        return Sample(payload, label, key)
