"""Meeting an archive: which sample of a source is the one each row of the archive was made from.

Content decides, the key only names:

    matched     same key, same bytes
    renamed     other key, same bytes: as good as matched (the pixels are the same)
    changed     same key, but bytes the archive has never seen
    missing     neither the key nor the bytes are there
    extra       a sample of the source that no row of the archive was made from
    duplicate   a sample of the source whose bytes an earlier one has, too; for information only
    relabelled  matched or renamed, but the source says another class

Order never matters. Equal bytes under several keys are told apart by key, then by label, then taken in order.

Classes are compared by name where both sides have names: the same names in another order give a permutation
(`label_map`), classes the archive does not know map to -1. Without names on either side, label k is label k.
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
    """How a source and an archive fit together."""

    source_row_of_archive_row: np.ndarray
    """[N of the archive] int64: the number of the sample in its source, -1 where the archive's row has none."""
    label_map: np.ndarray | None
    """[classes of the source] int64: the archive's label of each, -1 unknown; None where labels mean the same."""
    counts: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """First keys of each kind: the archive's for changed and missing, 'old -> new' for renamed, else the source's."""

    @property
    def rows(self) -> np.ndarray:
        """The archive's rows that can be trained on, in order."""
        rows: np.ndarray = np.flatnonzero(self.source_row_of_archive_row >= 0)
        return rows

    @property
    def exact(self) -> bool:
        """Every row of the archive has its sample, and no sample is left over."""
        return not any(self.counts[kind] for kind in ("changed", "missing", "extra", "relabelled"))

    def summary(self) -> str:
        """Counts and first examples in one line."""
        parts = []
        for kind in KINDS:
            count, some = self.counts[kind], self.examples[kind]
            if count or kind == "matched":
                shown = ", ".join(map(repr, some)) + (", ..." if count > len(some) else "")
                parts.append(f"{count} {kind}" + (f" ({shown})" if some and kind != "matched" else ""))
        return ", ".join(parts)


def join(
    index: SourceIndex,
    *,
    keys: Iterable[str],
    labels: np.ndarray,
    digests: np.ndarray,
    class_names: Iterable[str] | None,
    allow_missing: bool = False,
    allow_relabelled: bool = False,
) -> Join:
    """Find the sample of `index` behind each row of an archive with these keys, labels, digests and class names.

    Refuses when a row is missing or changed, unless `allow_missing`; when classes disagree, unless
    `allow_relabelled`; and always when nothing at all matches.
    """
    theirs = pack_keys(keys)
    names = None if class_names is None else tuple(class_names)
    label_map = _map_labels(index.class_names, names)
    mine_labels = _translate(index.labels, label_map)
    pairs = _Pairs(index, theirs, np.asarray(labels, np.int64), np.asarray(digests, np.uint8), mine_labels)
    found = pairs.to_join(None if label_map is None or _is_identity(label_map) else label_map)
    _refuse_misfits(found, index.class_names, names, allow_missing, allow_relabelled)
    return found


class _Pairs:
    """Rows of the archive and rows of the index, paired in rounds from the strictest to the loosest likeness."""

    def __init__(
        self, index: SourceIndex, keys: PackedKeys, labels: np.ndarray, digests: np.ndarray, mine_labels: np.ndarray
    ) -> None:
        self.index, self.keys, self.labels, self.digests, self.mine_labels = index, keys, labels, digests, mine_labels
        self.partner = np.full(len(keys), -1, np.int64)
        self.used = np.zeros(len(index), bool)
        my_words, words = _words(index.digests), _words(digests)
        my_keys, their_keys = index.keys.hashes(), keys.hashes()
        my_digests, their_digests = hash_words(my_words), hash_words(words)
        mixed = (_mix(their_keys, their_digests), _mix(my_keys, my_digests))
        self.matched = self._round(*mixed, same_key=True, same_bytes=True)
        labelled = (_mix(their_digests, labels), _mix(my_digests, mine_labels))
        renamed = [self._round(*labelled, same_bytes=True), self._round(their_digests, my_digests, same_bytes=True)]
        self.renamed = np.sort(np.concatenate(renamed))
        content = self.partner.copy()
        self.changed = self._round(their_keys, my_keys, same_key=True)
        self.missing = np.flatnonzero(self.partner < 0)
        self.partner = content
        self.extra = np.flatnonzero(~self.used)
        self.duplicate = repeats(my_digests)
        self.relabelled = self._relabelled()

    def _round(
        self, theirs: np.ndarray, mine: np.ndarray, *, same_key: bool = False, same_bytes: bool = False
    ) -> np.ndarray:
        """Pair what is still free by hash, keep the pairs that are truly equal; returns the archive's rows."""
        rows: np.ndarray = np.flatnonzero(self.partner < 0)
        my_rows: np.ndarray = np.flatnonzero(~self.used)
        left, right = pair_up(theirs[rows], mine[my_rows])
        rows, my_rows = rows[left], my_rows[right]
        if same_bytes:
            same = _equal_rows(self.digests, rows, self.index.digests, my_rows)
            rows, my_rows = rows[same], my_rows[same]
        if same_key:
            same = self.keys.equal_at(rows, self.index.keys, my_rows)
            rows, my_rows = rows[same], my_rows[same]
        self.partner[rows] = my_rows
        self.used[my_rows] = True
        return rows

    def _relabelled(self) -> np.ndarray:
        """Rows of the index whose class is not the archive's; a side without a label has no say."""
        rows = np.flatnonzero(self.partner >= 0)
        partners: np.ndarray = self.partner[rows]
        said = (self.labels[rows] != NO_LABEL) & (self.index.labels[partners] != NO_LABEL)
        relabelled: np.ndarray = partners[said & (self.labels[rows] != self.mine_labels[partners])]
        return relabelled

    def to_join(self, label_map: np.ndarray | None) -> Join:
        mine, theirs = self.index.keys, self.keys
        kinds = {
            "matched": (self.matched, theirs),
            "renamed": (self.renamed, theirs),
            "changed": (self.changed, theirs),
            "missing": (self.missing, theirs),
            "extra": (self.extra, mine),
            "duplicate": (self.duplicate, mine),
            "relabelled": (self.relabelled, mine),
        }
        examples = {kind: tuple(names[int(i)] for i in rows[:EXAMPLES]) for kind, (rows, names) in kinds.items()}
        moved = zip(self.renamed[:EXAMPLES].tolist(), examples["renamed"], strict=True)
        examples["renamed"] = tuple(f"{old} -> {mine[int(self.partner[i])]}" for i, old in moved)
        rows = np.full(len(self.partner), -1, np.int64)
        here = self.partner >= 0
        rows[here] = self.index.rows[self.partner[here]]
        return Join(rows, label_map, {kind: len(rows) for kind, (rows, _) in kinds.items()}, examples)


def _refuse_misfits(
    found: Join,
    mine: tuple[str, ...] | None,
    theirs: tuple[str, ...] | None,
    allow_missing: bool,
    allow_relabelled: bool,
) -> None:
    counts = found.counts
    if not counts["matched"] and not counts["renamed"]:
        raise Refused(
            f"no image of the data is one the archive was made from: {found.summary()}; "
            "point to the images (and the split) the archive was made from, byte for byte"
        )
    if (counts["missing"] or counts["changed"]) and not allow_missing:
        raise Refused(
            f"the data does not match the archive: {found.summary()}; "
            "use the images the archive was made from, or allow missing ones to train on what matches"
        )
    if counts["relabelled"] and not allow_relabelled:
        raise Refused(
            f"the classes of the data do not match the archive's: {found.summary()}{_class_difference(mine, theirs)}; "
            "mend the labels, or allow relabelled samples to train with the labels of the archive"
        )


def _class_difference(mine: tuple[str, ...] | None, theirs: tuple[str, ...] | None) -> str:
    if mine is None or theirs is None:
        return "; class names to compare by are not known on both sides"
    added, gone = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
    if not added and not gone:
        return ""
    return f"; class names only in the data: {added[:EXAMPLES]}, only in the archive: {gone[:EXAMPLES]}"


def _map_labels(mine: tuple[str, ...] | None, theirs: tuple[str, ...] | None) -> np.ndarray | None:
    """The archive's label of each class of the source, by name; None without names."""
    if mine is None or theirs is None:
        return None
    if mine == theirs:
        return np.arange(len(mine))
    for side, names in (("data", mine), ("archive", theirs)):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise Refused(
                f"class {twice[0]!r} is there twice in the class names of the {side}, and their order differs from the "
                "other side's, so classes cannot be matched by name; give classes unique names"
            )
    place = {name: i for i, name in enumerate(theirs)}
    return np.array([place.get(name, -1) for name in mine], np.int64)


def _translate(labels: np.ndarray, label_map: np.ndarray | None) -> np.ndarray:
    """Labels of the source as labels of the archive."""
    if label_map is None:
        return labels
    if len(label_map) == 0:
        return np.full(len(labels), NO_LABEL, np.int64)
    inside = (labels >= 0) & (labels < len(label_map))
    return np.where(inside, label_map[np.where(inside, labels, 0)], NO_LABEL)


def _is_identity(label_map: np.ndarray) -> bool:
    return bool((label_map == np.arange(len(label_map))).all())


def _words(digests: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(digests).view(np.uint64)


def _mix(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return hash_words(np.column_stack([left, right.astype(np.int64, copy=False).view(np.uint64)]))


def _equal_rows(left: np.ndarray, left_rows: np.ndarray, right: np.ndarray, right_rows: np.ndarray) -> np.ndarray:
    """Whether rows of two digest tables are equal, pair by pair, in slices that stay small."""
    same = np.empty(len(left_rows), bool)
    for start in range(0, len(left_rows), 65536):
        part = slice(start, start + 65536)
        same[part] = (left[left_rows[part]] == right[right_rows[part]]).all(axis=1)
    return same
