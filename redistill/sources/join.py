"""Joining a source to an archive: which sample each row of the archive was made from.

Samples are matched by content; keys only distinguish samples of equal content:

    matched     same key, same bytes
    renamed     other key, same bytes: as good as matched (the pixels are the same)
    changed     same key, other bytes
    missing     the source has neither the key nor the bytes
    extra       a sample of the source that no row of the archive was made from
    duplicate   a sample of the source with the bytes of an earlier one; for information only
    relabelled  matched or renamed, but with another class in the source

Order never matters. Equal bytes under several keys are matched by key, then by label, then in order.

Classes are compared by name where both sides have names, so the same names may be in another order, and the source may
have more classes than the archive. Where a side has no names, labels are compared as numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from redistill_cache.errors import Refused
from redistill_cache.keys import PackedKeys, hash_words, pack_keys

from redistill.sources.base import NO_LABEL
from redistill.sources.index import SourceIndex, pair_up, repeats

__all__ = ["Join", "join"]

KINDS = ("matched", "renamed", "changed", "missing", "extra", "duplicate", "relabelled")
EXAMPLES = 3


@dataclass(frozen=True)
class Join:
    """The sample of a source for each row of an archive."""

    source_row_of_archive_row: np.ndarray
    """[N of the archive] int64: the index of the row's sample in the source, -1 if the source lacks it."""
    counts: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """First keys of each kind: the archive's for changed or missing, 'old -> new' for renamed, else the source's."""

    @property
    def rows(self) -> np.ndarray:
        """The archive's rows that can be trained on, in order."""
        rows: np.ndarray = np.flatnonzero(self.source_row_of_archive_row >= 0)
        return rows

    @property
    def exact(self) -> bool:
        """Every row of the archive has its sample, and the source has no other samples."""
        return not any(self.counts[kind] for kind in ("changed", "missing", "extra", "relabelled"))

    def summary(self) -> str:
        """Counts and first keys in one line."""
        parts = []
        for kind in KINDS:
            count, keys = self.counts[kind], self.examples[kind]
            if count or kind == "matched":
                shown = ", ".join(map(repr, keys)) + (", ..." if count > len(keys) else "")
                parts.append(f"{count} {kind}" + (f" ({shown})" if keys and kind != "matched" else ""))
        return ", ".join(parts)


def join(
    index: SourceIndex,
    *,
    keys: Iterable[str],
    labels: np.ndarray,
    digests: np.ndarray,
    class_names: Iterable[str] | None,
    allow_missing: bool = False,
) -> Join:
    """Find the sample of `index` behind each row of an archive with these keys, labels, digests and class names.

    Refused when nothing matches; when classes differ; and when a row is missing or changed, unless `allow_missing`.
    """
    names = None if class_names is None else tuple(class_names)
    source_labels = _as_archive_labels(index, names)
    pairs = _Pairs(index, source_labels, pack_keys(keys), np.asarray(labels, np.int64), np.asarray(digests, np.uint8))
    joined = pairs.to_join()
    _refuse_mismatch(joined, index.class_names, names, allow_missing)
    return joined


class _Pairs:
    """Rows of the archive and of the source's index, paired in rounds: by key and bytes, by bytes, by key."""

    def __init__(
        self, index: SourceIndex, source_labels: np.ndarray, keys: PackedKeys, labels: np.ndarray, digests: np.ndarray
    ) -> None:
        self.index, self.source_labels = index, source_labels
        self.keys, self.labels, self.digests = keys, labels, digests
        self.partner = np.full(len(keys), -1, np.int64)
        self.used = np.zeros(len(index), bool)
        key_hashes, index_keys = keys.hashes(), index.keys.hashes()
        digest_hashes, index_digests = hash_words(_words(digests)), hash_words(_words(index.digests))
        both = (_mix(key_hashes, digest_hashes), _mix(index_keys, index_digests))
        self.matched = self._pair(*both, same_key=True, same_bytes=True)
        labelled = (_mix(digest_hashes, labels), _mix(index_digests, source_labels))
        renamed = [self._pair(*labelled, same_bytes=True), self._pair(digest_hashes, index_digests, same_bytes=True)]
        self.renamed = np.sort(np.concatenate(renamed))
        by_content = self.partner.copy()
        self.changed = self._pair(key_hashes, index_keys, same_key=True)
        self.missing = np.flatnonzero(self.partner < 0)
        self.partner = by_content
        self.extra = np.flatnonzero(~self.used)
        self.duplicate = repeats(index_digests)
        self.relabelled = self._relabelled()

    def _pair(
        self, hashes: np.ndarray, index_hashes: np.ndarray, *, same_key: bool = False, same_bytes: bool = False
    ) -> np.ndarray:
        """Pair unpaired rows of equal hash, if they are truly equal; returns the rows of the archive."""
        rows: np.ndarray = np.flatnonzero(self.partner < 0)
        index_rows: np.ndarray = np.flatnonzero(~self.used)
        left, right = pair_up(hashes[rows], index_hashes[index_rows])
        rows, index_rows = rows[left], index_rows[right]
        if same_bytes:
            same = _equal_rows(self.digests, rows, self.index.digests, index_rows)
            rows, index_rows = rows[same], index_rows[same]
        if same_key:
            same = self.keys.equal_at(rows, self.index.keys, index_rows)
            rows, index_rows = rows[same], index_rows[same]
        self.partner[rows] = index_rows
        self.used[index_rows] = True
        return rows

    def _relabelled(self) -> np.ndarray:
        """Rows of the index whose class is not the archive's, where both sides have a label."""
        rows = np.flatnonzero(self.partner >= 0)
        partners: np.ndarray = self.partner[rows]
        labelled = (self.labels[rows] != NO_LABEL) & (self.index.labels[partners] != NO_LABEL)
        relabelled: np.ndarray = partners[labelled & (self.labels[rows] != self.source_labels[partners])]
        return relabelled

    def to_join(self) -> Join:
        kinds = {
            "matched": (self.matched, self.keys),
            "renamed": (self.renamed, self.keys),
            "changed": (self.changed, self.keys),
            "missing": (self.missing, self.keys),
            "extra": (self.extra, self.index.keys),
            "duplicate": (self.duplicate, self.index.keys),
            "relabelled": (self.relabelled, self.index.keys),
        }
        examples = {kind: tuple(keys[int(i)] for i in rows[:EXAMPLES]) for kind, (rows, keys) in kinds.items()}
        old_keys = zip(self.renamed[:EXAMPLES].tolist(), examples["renamed"], strict=True)
        examples["renamed"] = tuple(f"{old} -> {self.index.keys[int(self.partner[i])]}" for i, old in old_keys)
        source_rows = np.full(len(self.partner), -1, np.int64)
        paired = self.partner >= 0
        source_rows[paired] = self.index.rows[self.partner[paired]]
        return Join(source_rows, {kind: len(rows) for kind, (rows, _) in kinds.items()}, examples)


def _refuse_mismatch(
    joined: Join, source_names: tuple[str, ...] | None, archive_names: tuple[str, ...] | None, allow_missing: bool
) -> None:
    counts = joined.counts
    if not counts["matched"] and not counts["renamed"]:
        raise Refused(
            f"expected the images the archive was made from, byte for byte, found none of them: {joined.summary()}; "
            "use the data and the split the archive was made from"
        )
    if counts["relabelled"]:  # first: to allow missing images does not help
        raise Refused(
            f"the classes of the data do not match the archive's: {joined.summary()}; "
            f"{_class_advice(source_names, archive_names)}"
        )
    if (counts["missing"] or counts["changed"]) and not allow_missing:
        raise Refused(
            f"the data does not match the archive: {joined.summary()}; use the images the archive was made from, or "
            "train on those that match: redistill train --allow-missing, in Python allow_missing=True"
        )


def _class_advice(source_names: tuple[str, ...] | None, archive_names: tuple[str, ...] | None) -> str:
    if source_names is None or archive_names is None:
        side = "the data has" if source_names is None else "the archive has"
        return f"{side} no class names to compare by, so number the classes of the data as the archive does"
    added = sorted(set(source_names) - set(archive_names))
    missing = sorted(set(archive_names) - set(source_names))
    if not added and not missing:
        return "put each image into the class that it has in the archive"
    return (
        f"class names only in the data: {added[:EXAMPLES]}, only in the archive: {missing[:EXAMPLES]}; "
        "give the classes of the data the names that they have in the archive"
    )


def _as_archive_labels(index: SourceIndex, archive_names: tuple[str, ...] | None) -> np.ndarray:
    """The labels of the source as the archive numbers its classes; NO_LABEL for a class that it does not have."""
    source_names, labels = index.class_names, index.labels
    if source_names is None or archive_names is None:
        return labels
    by_label = list(range(len(source_names)))
    if source_names != archive_names:
        for side, names in (("data", source_names), ("archive", archive_names)):
            repeated = [name for name, count in Counter(names).items() if count > 1]
            if repeated:
                raise Refused(
                    f"class {repeated[0]!r} occurs twice in the class names of the {side}, and the names differ from "
                    "the other side's, so classes cannot be matched by name; give classes unique names"
                )
        position = {name: i for i, name in enumerate(archive_names)}
        by_label = [position.get(name, NO_LABEL) for name in source_names]
    valid = (labels >= 0) & (labels < len(by_label))
    return np.array([*by_label, NO_LABEL], np.int64)[np.where(valid, labels, -1)]


def _words(digests: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(digests).view(np.uint64)


def _mix(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return hash_words(np.column_stack([left, right.astype(np.int64, copy=False).view(np.uint64)]))


def _equal_rows(left: np.ndarray, left_rows: np.ndarray, right: np.ndarray, right_rows: np.ndarray) -> np.ndarray:
    """Whether rows of two digest tables are equal, pair by pair, in slices that bound the memory."""
    same = np.empty(len(left_rows), bool)
    for start in range(0, len(left_rows), 65536):
        part = slice(start, start + 65536)
        same[part] = (left[left_rows[part]] == right[right_rows[part]]).all(axis=1)
    return same
