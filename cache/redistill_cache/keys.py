"""Millions of sample keys: one buffer of UTF-8 and one of offsets, as they are stored in an archive.

A list of 1.28 million Python strings takes 100 MB and a set of them twice that; packed, a key takes its bytes plus
eight. Operations on all keys (joining, finding duplicates) work on numpy arrays: keys are hashed, compared by hash, and
every match is then confirmed byte by byte, so that a collision, by chance or crafted, can lose a match but never
produce a wrong one.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

import numpy as np

from redistill_cache import limits
from redistill_cache.errors import Damaged

__all__ = ["PackedKeys", "hash_words", "keys_flaw", "pack_keys"]

# Keys are processed in slices whose zero-padded matrix takes about this many bytes, however long a single key is.
SLICE_BYTES = 8 << 20
# Random per process, so that keys cannot be crafted to collide.
_MULTIPLIERS = np.array([secrets.randbits(64) | 1 for _ in range(2)], dtype=np.uint64)
_SHIFT = np.uint64(29)


class PackedKeys(Sequence[str]):
    """An immutable sequence of strings: key i is the UTF-8 text `data[offsets[i]:offsets[i + 1]]`."""

    __slots__ = ("data", "offsets")

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        """The arrays may be untrusted: `Damaged` when the offsets do not fit the data."""
        data, offsets = np.asarray(data, np.uint8), np.asarray(offsets)
        fits = (
            offsets.ndim == 1 and offsets.size > 0 and data.ndim == 1 and offsets[0] == 0 and offsets[-1] == len(data)
        )
        if not fits or np.any(offsets[1:] < offsets[:-1]):
            raise Damaged("the keys are damaged: expected offsets that rise from 0 to the number of key bytes")
        self.data = data
        self.offsets = offsets.astype(np.uint64, copy=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PackedKeys: ...
    def __getitem__(self, index: int | slice) -> str | PackedKeys:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        i = int(index)
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            raise IndexError(f"key {index} of {len(self)}")
        return self._bytes(i).decode("utf-8", errors="replace")

    def __iter__(self) -> Iterator[str]:
        return (self._bytes(i).decode("utf-8", errors="replace") for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedKeys):
            return NotImplemented
        return bool(np.array_equal(self.offsets, other.offsets) and np.array_equal(self.data, other.data))

    def __hash__(self) -> int:
        return hash((len(self), self.data.tobytes()))

    def __repr__(self) -> str:
        return f"PackedKeys({len(self)} keys, {self.data.nbytes + self.offsets.nbytes} bytes)"

    def __reduce__(self) -> tuple[type[PackedKeys], tuple[np.ndarray, np.ndarray]]:
        return PackedKeys, (self.data, self.offsets)

    def _bytes(self, i: int) -> bytes:
        return self.data[int(self.offsets[i]) : int(self.offsets[i + 1])].tobytes()

    def lengths(self) -> np.ndarray:
        """Bytes of each key, int64."""
        return np.diff(self.offsets).astype(np.int64)

    def take(self, rows: np.ndarray) -> PackedKeys:
        """The keys at `rows`, in that order."""
        lengths = self.lengths()[rows]
        offsets = np.zeros(len(rows) + 1, np.uint64)
        np.cumsum(lengths, out=offsets[1:])
        data = np.empty(int(offsets[-1]), np.uint8)
        for part in _slices(lengths):
            source = np.repeat(self.offsets[:-1][rows[part]] - offsets[:-1][part], lengths[part])
            first, last = int(offsets[part.start]), int(offsets[part.stop])
            data[first:last] = self.data[np.arange(first, last, dtype=np.uint64) + source]
        return PackedKeys(data, offsets)

    def hashes(self) -> np.ndarray:
        """A 64-bit hash of every key; comparable within one process only."""
        lengths = self.lengths()
        out = np.empty(len(self), np.uint64)
        for part in _slices(lengths):
            rows = np.arange(part.start, part.stop)
            out[part] = hash_words(self._padded(rows, lengths[part]), lengths[part])
        return out

    def equal_at(self, rows: np.ndarray, other: PackedKeys, other_rows: np.ndarray) -> np.ndarray:
        """For each pair of rows, whether the two keys are the same bytes."""
        lengths = self.lengths()[rows]
        same: np.ndarray = np.equal(lengths, other.lengths()[other_rows])
        candidates = np.flatnonzero(same)
        lengths = lengths[candidates]
        for part in _slices(lengths):
            at = candidates[part]
            words = self._padded(rows[at], lengths[part])
            same[at] = (words == other._padded(other_rows[at], lengths[part])).all(axis=1)
        return same

    def find(self, keys: PackedKeys) -> np.ndarray:
        """The position of each of these keys here, -1 for one that is not here."""
        hashes = self.hashes()
        order = np.argsort(hashes)
        rows: np.ndarray = order[np.minimum(np.searchsorted(hashes[order], keys.hashes()), len(order) - 1)]
        rows[~self.equal_at(rows, keys, np.arange(len(keys)))] = -1
        return rows

    def _padded(self, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Keys as the rows of a matrix of 64-bit words, padded with zeros."""
        words = -(-int(lengths.max(initial=0)) // 8)
        matrix = np.zeros((len(rows), words * 8), np.uint8)
        columns = np.arange(words * 8)
        starts = self.offsets[:-1][rows].astype(np.int64)
        if len(lengths) and (lengths == lengths[0]).all():  # as in most data sets; needs no mask
            matrix[:, : lengths[0]] = self.data[starts[:, None] + columns[: lengths[0]]]
        else:
            inside = columns < lengths[:, None]
            matrix[inside] = self.data[(starts[:, None] + columns)[inside]]
        words_NW: np.ndarray = matrix.view(np.uint64)
        return words_NW


def pack_keys(keys: Iterable[str]) -> PackedKeys:
    """Pack strings; packed keys are returned as they are."""
    if isinstance(keys, PackedKeys):
        return keys
    texts, parts, lengths = iter(keys), [], [np.zeros(1, np.uint64)]
    while encoded := [key.encode() for key in islice(texts, 65536)]:  # a million bytes objects would take 80 MB
        parts.append(b"".join(encoded))
        lengths.append(np.fromiter(map(len, encoded), np.uint64, len(encoded)))
    offsets = np.cumsum(np.concatenate(lengths), dtype=np.uint64)
    return PackedKeys(np.frombuffer(b"".join(parts), np.uint8), offsets)


def keys_flaw(keys: PackedKeys) -> str | None:
    """Why these cannot be the keys of an archive, or None: each is UTF-8 of 1 to 4096 bytes, and occurs once."""
    lengths = keys.lengths()
    if not len(keys) or int(lengths.min()) < 1 or int(lengths.max()) > limits.MAX_KEY_BYTES:
        return f"every sample needs a key of 1 to {limits.MAX_KEY_BYTES} bytes"
    starts = keys.offsets[:-1]
    torn = (keys.data[starts] & 0xC0) == 0x80  # starts in the middle of a character
    for part in _slices(lengths):
        first = int(starts[part.start])
        try:
            keys.data[first : int(keys.offsets[part.stop])].tobytes().decode()
        except UnicodeDecodeError as error:
            torn[np.searchsorted(starts, first + error.start, "right") - 1] = True
            break
    if torn.any():
        return f"the key of sample {int(np.argmax(torn))} is not UTF-8"
    hashes = keys.hashes()
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    repeats = same[keys.equal_at(order[same], keys, order[same + 1])]
    return f"two samples have the key {keys[int(order[repeats[0]])]!r}; keys must be unique" if len(repeats) else None


def hash_words(words: np.ndarray, lengths: np.ndarray | None = None) -> np.ndarray:
    """A 64-bit hash of each row of a matrix of 64-bit words; comparable within one process only.

    With `lengths` (in bytes), a row ends there and the padding after it is ignored.
    """
    state = np.full(len(words), _MULTIPLIERS[1], np.uint64)
    if lengths is not None:
        state += lengths.astype(np.uint64)
    for i, column in enumerate(words.T):
        mixed = (state ^ column) * _MULTIPLIERS[0]
        mixed ^= mixed >> _SHIFT
        mixed *= _MULTIPLIERS[1]
        mixed ^= mixed >> _SHIFT
        state = mixed if lengths is None else np.where(lengths > 8 * i, mixed, state)
    return state


def _slices(lengths: np.ndarray) -> Iterator[slice]:
    """Consecutive rows whose padded matrix stays within SLICE_BYTES (or a single row that alone exceeds it)."""
    start = 0
    while start < len(lengths):
        rows = 65536
        while True:
            longest = int(lengths[start : start + rows].max())
            if rows == 1 or rows * (longest + 8) <= SLICE_BYTES:
                break
            rows = max(1, min(rows // 2, SLICE_BYTES // (longest + 8)))
        yield slice(start, min(start + rows, len(lengths)))
        start += rows
