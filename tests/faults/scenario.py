"""The archive of the fault tests: small, with every kind of part; written by many processes, compared when read.

All values are functions of (part, view, row), so that any process can write any block and any reader can be checked.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import redistill_cache
from redistill_cache.codecs import BlockStats, Codec, Encoded, fit_codec
from redistill_cache.errors import OutOfRange, Refused
from redistill_cache.layout import Block
from redistill_cache.spec import ArchiveSpec, ArraySpec, SignalSpec, TeacherSpec
from redistill_cache.storage import LOCAL, Files, is_leftover
from redistill_cache.writer import ArchiveWriter

__all__ = [
    "SPEC",
    "block_arrays",
    "count_correct_rows",
    "hashes",
    "leftovers",
    "open_writer",
    "prepare",
    "write_archive",
]

SAMPLES, VIEWS, CLASSES, CANARIES = 21, 2, 7, 3

SPEC = ArchiveSpec(
    num_samples=SAMPLES,
    num_views=VIEWS,
    num_classes=CLASSES,
    class_names=tuple(f"class-{i}" for i in range(CLASSES)),
    block_rows=16,  # the second block of a view is short
    recipe={"name": "test", "version": 1},
    view_arrays=(ArraySpec("crop", "int32", (4,), chunk_rows=8), ArraySpec("flip", "uint8", chunk_rows=8)),
    canaries_per_view=CANARIES,
    source={"description": "made up"},
    licence="CC0-1.0",
)


def random_of(*key: object) -> np.random.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


# -- content ----------------------------------------------------------------------------------------------------------

KEYS = tuple(f"train/{i % 3}/image-{i:03d}.png" for i in range(SAMPLES))
LABELS = np.arange(SAMPLES) % CLASSES
SIZES = np.stack([np.arange(SAMPLES) + 32, np.full(SAMPLES, 48)], axis=1).astype(np.uint32)
DIGESTS = np.stack([np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint8) for key in KEYS])


@functools.cache
def logits(view: int) -> np.ndarray:
    """The teacher's logits of one view, [N, C]."""
    rows = random_of("logits", view).normal(size=(SAMPLES, CLASSES)) * 3
    rows[4, :2] = 60.0, -60.0  # an outlier compared with the pilot
    return rows.astype(np.float32)


@functools.cache
def codec() -> Codec:
    pilot = random_of("pilot").normal(size=(64, CLASSES)) * 3
    return fit_codec("linear", pilot.astype(np.float32))


@functools.cache
def teacher() -> TeacherSpec:
    return TeacherSpec("net", (SignalSpec.of("logits", codec()),), {"name": "demo:net"})


@functools.cache
def encoded(view: int, start: int, stop: int) -> Encoded:
    return codec().encode(logits(view)[start:stop])


@functools.cache
def stats(view: int, start: int, stop: int) -> dict[str, object]:
    return {"logits": BlockStats.of(encoded(view, start, stop)).to_json()}


def decoded(view: int) -> np.ndarray:
    """The logits that an archive must return, straight from the codec."""
    blocks = [(start, min(start + 16, SAMPLES)) for start in range(0, SAMPLES, 16)]
    return np.concatenate([codec().decode(encoded(view, *block).arrays) for block in blocks])


def view_params(view: int) -> dict[str, np.ndarray]:
    crop = random_of("crop", view).integers(0, 1000, (SAMPLES, 4)).astype(np.int32)
    return {"crop": crop, "flip": (np.arange(SAMPLES, dtype=np.uint8) + np.uint8(view)) % 2}


def canaries(view: int) -> dict[str, np.ndarray]:
    pixels = random_of("pixels", view).integers(0, 256, (CANARIES, 8, 8, 3)).astype(np.uint8)
    return {"row": np.array([1, 5, 20], np.uint32), "pixels": pixels}


def block_arrays(block: Block) -> dict[str, np.ndarray]:
    """The arrays of any block."""
    rows = slice(block.start, block.stop)
    if block.part == "canaries":
        return canaries(block.view)
    if block.part == "views":
        return {name: array[rows] for name, array in view_params(block.view).items()}
    arrays = encoded(block.view, block.start, block.stop).arrays
    return {f"logits/{name}": array for name, array in arrays.items()}


def block_stats(block: Block) -> dict[str, object] | None:
    return stats(block.view, block.start, block.stop) if block.part.startswith("teachers/") else None


# -- writing ----------------------------------------------------------------------------------------------------------


def open_writer(path: Path, files: Files = LOCAL) -> ArchiveWriter:
    """Resume the archive, or create it if it does not exist, as the command does."""
    try:
        return ArchiveWriter.create(path, SPEC, files=files)
    except Refused as refused:
        try:
            return ArchiveWriter.resume(path, SPEC, files=files)
        except Refused as error:
            raise error from refused


def prepare(writer: ArchiveWriter) -> None:
    writer.write_samples(KEYS, LABELS, DIGESTS, SIZES)
    writer.add_teacher(teacher(), {"logits": codec().side()})


def all_missing(writer: ArchiveWriter) -> Iterable[Block]:
    for part in writer.parts():
        yield from writer.missing(part)


def write_archive(path: Path, files: Files = LOCAL, committed: Callable[[Block], None] | None = None) -> str:
    """Create or resume the archive and finish it. `committed` is called with each block after its write returned."""
    writer = open_writer(path, files)
    prepare(writer)
    for block in list(all_missing(writer)):
        writer.write(block, block_arrays(block), block_stats(block))
        if committed is not None:
            committed(block)
    return writer.seal()


# -- reading and comparing --------------------------------------------------------------------------------------------


def count_correct_rows(path: Path, *, partial: bool = False) -> int:
    """Read all available data and return the number of rows. AssertionError for a wrong value.

    Errors of the library are raised; missing rows of a partial archive are not counted.
    """
    archive = redistill_cache.open_archive(path, allow_partial=partial)
    assert list(archive.keys) == list(KEYS)
    assert np.array_equal(archive.labels, LABELS)
    assert np.array_equal(archive.digests, DIGESTS)
    assert np.array_equal(archive.sizes, SIZES)
    assert archive.class_names == SPEC.class_names
    return sum(count_correct_rows_of_view(archive, view) for view in range(VIEWS))


def count_correct_rows_of_view(archive: redistill_cache.Archive, view: int) -> int:
    if "net" not in archive.teachers:
        assert not archive.complete
        return 0
    rows = archive.rows_available(view)
    assert len(rows) == SAMPLES or not archive.complete
    assert np.array_equal(archive.logits(view, rows), decoded(view)[rows])
    for name, values in archive.view_params(view, rows).items():
        assert np.array_equal(values, view_params(view)[name][rows])
    try:
        stored = archive.canaries(view)
    except OutOfRange:
        assert not archive.complete
        return len(rows)
    for values, expected in zip(stored, canaries(view).values(), strict=True):
        assert np.array_equal(values, expected)
    return len(rows)


# -- comparing trees --------------------------------------------------------------------------------------------------


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by path."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def leftovers(path: Path) -> list[str]:
    return [str(file.relative_to(path)) for file in path.rglob("*") if is_leftover(file)]
