"""Some of the views and rows of an archive, as an archive of its own: `plan_subset`, then `write_subset`.

Nothing is encoded again: the stored integers are copied, so every value is that of the parent, bit for bit, and within
the bound of its codec. Where all rows are kept, the files themselves are copied, with their statistics. The statistics
of some rows of a block cannot be computed without the teacher, so then there are none. The rows and views of a subset
have new numbers, and its specification names the parent.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from redistill_cache import layout
from redistill_cache.combining import Source, read_stored
from redistill_cache.download import Notify, say
from redistill_cache.errors import Damaged, Incomplete, OutOfRange, Refused, UsageError
from redistill_cache.keys import pack_keys
from redistill_cache.layout import Block, side_block
from redistill_cache.locks import locked
from redistill_cache.open_state import ArchiveState
from redistill_cache.reader import Archive
from redistill_cache.rows import read_rows
from redistill_cache.shards import encode_shard
from redistill_cache.spec import ArchiveSpec, Parent
from redistill_cache.storage import LOCAL, Files, disk_trouble, refuse_full_disk
from redistill_cache.verify import verify
from redistill_cache.writer import ArchiveWriter

__all__ = ["Subset", "choose_rows", "choose_views", "plan_subset", "write_subset"]

Progress = Callable[[int, int], None]
MIX_PARTNER = "mix_partner"  # the view parameter that refers to another row


# -- choosing ---------------------------------------------------------------------------------------------------------


def _span(text: str, count: int, what: str) -> range | None:
    """'2:5' -> 2, 3, 4; None if the text is not a span."""
    match = re.fullmatch(r"(\d{0,10}):(\d{0,10})", text)
    if match is None:
        return None
    start, stop = int(match[1] or 0), int(match[2] or count)
    if not start < stop <= count:
        raise OutOfRange(f"{what} {text}: expected a span within 0:{count} that is not empty")
    return range(start, stop)


def choose_views(text: str, count: int) -> tuple[int, ...]:
    """The views of '3' (the first three), '0,2,5' or '2:5', of an archive with `count` views."""
    if (span := _span(text, count, "--views")) is not None:
        return tuple(span)
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        raise UsageError(f"--views takes a number of views, a list such as 0,2,5 or a span such as 2:5, found {text!r}")
    numbers = tuple(map(int, text.split(",")))
    views = numbers if len(numbers) > 1 else tuple(range(numbers[0]))
    if list(views) != sorted(set(views)) or not views:
        raise UsageError(f"--views {text}: expected at least one view, in rising order, each once")
    if views[-1] >= count:
        raise OutOfRange(f"--views {text}: the archive has views 0 to {count - 1}")
    return views


def choose_rows(
    archive: Archive,
    rows: str | None = None,
    classes: Sequence[str] = (),
    per_class: int | None = None,
    views: Sequence[int] = (),
) -> np.ndarray:
    """The rows, rising, that all of these choose: a span or a file, classes, and the first rows of each class.

    Of a class, rows whose images are canaries of one of the views come first, so that a small subset keeps some.
    """
    chosen = np.ones(archive.num_samples, bool)
    if rows is not None:
        chosen = np.zeros(archive.num_samples, bool)
        span = _span(rows, archive.num_samples, "--rows")
        chosen[_listed_rows(archive, Path(rows)) if span is None else slice(span.start, span.stop)] = True
    if classes:
        chosen &= np.isin(archive.labels, _labels(archive, classes))
    if per_class is not None:
        chosen &= archive.labels >= 0
        chosen[_beyond(archive, np.flatnonzero(chosen), per_class, views)] = False
    if not chosen.any():
        raise OutOfRange(f"{archive.path}: no row is left; choose others")
    return np.flatnonzero(chosen)


def _listed_rows(archive: Archive, file: Path) -> np.ndarray:
    """The rows that a file lists, one in each line, by number or by key."""
    with disk_trouble("read", file):
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UsageError(f"--rows {file}: expected a text file with a row number or a key in each line") from None
    if not lines:
        raise UsageError(f"--rows {file}: expected a row number or a key in each line, found none")
    if all(re.fullmatch(r"\d{1,10}", line) for line in lines):
        rows = np.array(lines, np.int64)
        lost = rows >= archive.num_samples
    else:
        rows = archive.keys.find(pack_keys(lines))
        lost = rows < 0
    if lost.any():
        raise OutOfRange(f"--rows {file}: {archive.path} has no sample {lines[int(np.argmax(lost))]!a}")
    values, counts = np.unique(rows, return_counts=True)
    if len(values) < len(rows):
        raise UsageError(f"--rows {file}: expected each sample once, found row {values[np.argmax(counts)]} again")
    return values


def _labels(archive: Archive, classes: Sequence[str]) -> list[int]:
    """The labels of classes that are given by name or by number."""
    labels = []
    for text in classes:
        named = [label for label, name in enumerate(archive.class_names or ()) if name == text]
        if not named and not (re.fullmatch(r"\d{1,7}", text) and int(text) < archive.num_classes):
            raise OutOfRange(f"--classes: {archive.path} has no class {text!r}; give names or numbers of its classes")
        labels += named or [int(text)]
    return labels


def _beyond(archive: Archive, rows: np.ndarray, per_class: int, views: Sequence[int]) -> np.ndarray:
    """Of these labelled rows, those after the first `per_class` of their class."""
    if not len(rows):
        raise OutOfRange(f"{archive.path}: --per-class needs labels, and none of these rows has one")
    is_canary = np.zeros(archive.num_samples, bool)
    if archive.spec.canaries_per_view:
        for view in views:
            is_canary[archive.canaries(view)[0]] = True
    ordered = rows[np.lexsort((rows, ~is_canary[rows], archive.labels[rows]))]
    labels = archive.labels[ordered]
    beyond: np.ndarray = ordered[np.arange(len(ordered)) - np.searchsorted(labels, labels) >= per_class]
    return beyond


# -- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subset:
    """What a subset will hold."""

    source: Source
    state: ArchiveState
    out: Path
    spec: ArchiveSpec
    rows: np.ndarray | None
    """Rows of the parent, rising; None: all of them, in whole files."""
    teacher_views: dict[str, int]
    """Of the chosen views, how many each teacher has; those without any are left out."""

    @property
    def views(self) -> tuple[int, ...]:
        """Views of the parent."""
        assert self.spec.subset_of is not None
        return self.spec.subset_of.views

    @property
    def estimated_bytes(self) -> int:
        """Exact where all rows are kept."""
        chosen = set(self.views)
        of_views = common = 0
        for name, entry in self.state.files.items():
            view = layout.view_of_file(name)
            of_views += entry.size if view in chosen else 0
            common += entry.size if view is None else 0
        share = self.spec.num_samples / self.state.spec.num_samples
        return common + int(of_views * share)


def plan_subset(archive: Archive, out: Path, views: Sequence[int], rows: np.ndarray | None = None) -> Subset:
    """Check that these views, of all rows or of some, can be an archive of their own. Nothing is written."""
    state = archive.state
    if state.id is None:
        raise Incomplete(f"{archive.path} is not finished, so it has no id that a subset could name; finish it first")
    if state.extended:
        raise Refused(f"{archive.path} is being changed, views are added to it; take a subset when that is finished")
    if rows is not None and len(rows) == archive.num_samples:
        rows = None
    if rows is not None and any(array.name == MIX_PARTNER for array in archive.spec.view_arrays):
        raise Refused(
            f"{archive.path}: its views mix every row with another one, which would be missing; choose views only"
        )
    counts = {name: bisect.bisect_left(views, state.views_of(name)) for name in state.teachers}
    kept = {name: n for name, n in counts.items() if n and counts[state.teachers[name].owner]}
    canaries = archive.spec.canaries_per_view
    if rows is not None and canaries:
        canaries = min(len(_canaries_among(archive, view, rows)) for view in views)
    spec = replace(
        archive.spec,
        num_samples=archive.num_samples if rows is None else len(rows),
        num_views=len(views),
        canaries_per_view=canaries,
        subset_of=Parent(state.id, tuple(views)),
    )
    return Subset(Source(archive.path), state, out.absolute(), spec, rows, kept)


def _canaries_among(archive: Archive, view: int, rows: np.ndarray) -> np.ndarray:
    """The positions of the canaries of a view whose rows are among these, in the order of the rows."""
    stored = archive.canaries(view)[0]
    positions = np.flatnonzero(np.isin(stored, rows))
    return positions[np.argsort(stored[positions])]


# -- writing ----------------------------------------------------------------------------------------------------------


def write_subset(
    subset: Subset, *, progress: Progress | None = None, notify: Notify = say, files: Files = LOCAL
) -> str:
    """Write the subset, or what an interrupted call left to do, and return its id."""
    out, archive = subset.out, Archive(subset.state)
    with disk_trouble("write", out), locked(out, f"writes {out}", notify):
        if (out / "zarr.json").exists():
            writer = ArchiveWriter.resume(out, subset.spec, files=files)
        else:
            refuse_full_disk(out, subset.estimated_bytes)
            writer = ArchiveWriter.create(out, subset.spec, files=files)
        _write_base(subset, archive, writer)
        blocks = [
            block
            for part in writer.parts()
            for block in layout.part_blocks(subset.spec, part, subset.spec.num_views)
            if block.view < subset.teacher_views.get(part.removeprefix("teachers/"), subset.spec.num_views)
        ]
        for done, block in enumerate(blocks, start=1):
            if not writer.is_committed(block):
                _write_block(subset, archive, writer, block)
            if progress is not None:
                progress(done, len(blocks))
        identity = writer.seal()
    damaged = verify(out).damaged
    if damaged:
        raise Damaged(f"{out}: {len(damaged)} files are damaged after they were written, the first: {damaged[0]}")
    return identity


def _write_base(subset: Subset, archive: Archive, writer: ArchiveWriter) -> None:
    rows = subset.rows
    if rows is None:
        block, files = next(layout.all_blocks(subset.spec, {}, 0))
        subset.source.copy(block, files, writer)
    else:
        writer.write_samples(archive.keys.take(rows), archive.labels[rows], archive.digests[rows], archive.sizes[rows])
    for name in subset.teacher_views:
        teacher = subset.state.teachers[name]
        writer.declare_teacher(teacher)
        files = [array.shard_path(0, 0) for array in layout.side_arrays(teacher).values()]
        subset.source.copy(side_block(name), files, writer)


def _write_block(subset: Subset, archive: Archive, writer: ArchiveWriter, block: Block) -> None:
    view = subset.views[block.view]
    if subset.rows is None:
        names = dict(_renamed(subset, block, view))
        record = subset.source.record(replace(block, view=view), names.values())
        files = ((new, read_stored(subset.state, old)) for new, old in names.items())
        writer.write_encoded(block, files, record.stats)
    elif block.part == "canaries":
        writer.write(block, _canaries(subset, archive, view))
    else:
        writer.write_encoded(block, _encoded(subset, block, view, subset.rows[block.start : block.stop]))


def _renamed(subset: Subset, block: Block, view: int) -> Iterator[tuple[str, str]]:
    """The files of a block, and those of the parent that have the same rows."""
    for array in layout.part_arrays(subset.spec, subset.state.teachers, block.part).values():
        yield array.shard_path(block.view, block.index), array.shard_path(view, block.index)


def _encoded(subset: Subset, block: Block, view: int, rows: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """The files of a block with some rows of the parent, one array after another."""
    own = layout.part_arrays(subset.spec, subset.state.teachers, block.part)
    for name, array in layout.part_arrays(subset.state.spec, subset.state.teachers, block.part).items():
        values = np.empty((len(rows), *array.row_shape), array.dtype)
        with disk_trouble("read", subset.state.path):
            read_rows(subset.state, block.part, array, view, rows, values)
        yield own[name].shard_path(block.view, block.index), encode_shard(own[name], values)


def _canaries(subset: Subset, archive: Archive, view: int) -> dict[str, np.ndarray]:
    """As many of the canaries of a view as every view has, spread evenly."""
    assert subset.rows is not None
    rows, pixels = archive.canaries(view)
    among = _canaries_among(archive, view, subset.rows)
    count = subset.spec.canaries_per_view
    kept = among[np.arange(count) * len(among) // count]
    return {"row": np.searchsorted(subset.rows, rows[kept]).astype(np.uint32), "pixels": pixels[kept]}
