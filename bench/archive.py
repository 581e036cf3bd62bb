"""The archive against the limits of the machine: writing, opening, loading whole views, gathering rows.

python bench/archive.py [--quick] [--json PATH]

Every ratio compares two ways of doing the same in one process, taking turns; `ratio` is ours over the limit's speed.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import arguments, report
from numcodecs import zstd
from redistill_cache import ArchiveSpec, ArchiveWriter, ArraySpec, SignalSpec, TeacherSpec, open_archive
from redistill_cache.codecs import fit_codec

REPEATS = 5


def take_turns(*jobs: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Median seconds of each job, run in turn so that noise hits all alike."""
    times: list[list[float]] = [[] for _ in jobs]
    for _ in range(repeats):
        for job, mine in zip(jobs, times, strict=True):
            start = time.perf_counter()
            job()
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in times]


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def write(path: Path, *, rows: int, views: int, classes: int, block_rows: int, codec: Any, encoded: Any) -> float:  # noqa: ANN401
    """Write an archive whose blocks all hold the same encoded rows; seconds."""
    spec = ArchiveSpec(
        num_samples=rows,
        num_views=views,
        num_classes=classes,
        block_rows=block_rows,
        view_arrays=(ArraySpec("crop", "int32", (4,), transpose=True),),
    )
    start = time.perf_counter()
    writer = ArchiveWriter.create(path, spec)
    digests = np.random.default_rng(0).integers(0, 256, (rows, 32), dtype=np.uint8)
    keys = [f"sample/{i:08d}" for i in range(rows)]
    writer.write_samples(keys, np.zeros(rows, np.int64), digests, np.full((rows, 2), 64, np.uint32))
    writer.add_teacher(TeacherSpec("net", (SignalSpec.of("logits", codec),)), {"logits": codec.side()})
    for part in writer.parts():
        for block in writer.missing(part):
            count = len(block.rows)
            if part == "views":
                writer.write(block, {"crop": np.zeros((count, 4), np.int32)})
            else:
                arrays = encoded.arrays.items()
                writer.write(block, {f"logits/{name}": np.asarray(values)[:count] for name, values in arrays})
    writer.seal()
    return time.perf_counter() - start


def make_logits(rows: int, classes: int) -> np.ndarray:
    """Rows with the decaying spectrum of a real teacher's logits."""
    rng = np.random.default_rng(1)
    rank = min(classes - 1, 256)
    weight = rng.normal(size=(rank, classes)) * (np.arange(1, rank + 1) ** -0.8)[:, None]
    return (rng.normal(size=(rows, rank)) @ weight * 2).astype(np.float32)


def view_rows(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Whole views and random rows, at 1000 classes."""
    block, blocks, classes = (2048, 2, 1000) if quick else (8192, 4, 1000)
    codec = fit_codec("linear", make_logits(4096, classes), rounding="plain", certified=False)
    encoded = codec.encode(make_logits(block, classes))
    path = folder / "view.redistill.zarr"
    rows = block * blocks
    seconds = write(path, rows=rows, views=2, classes=classes, block_rows=block, codec=codec, encoded=encoded)
    archive = open_archive(path)
    packed = archive.load_view(0)  # hashes the files: once a machine
    # The limit of loading: the same chunks through zstd alone, from memory into one buffer.
    frames, size = [], 0
    for name, values in packed.arrays.items():
        array = next(a for a in archive.teacher().signals[0].arrays if a.name == name)
        step = array.chunk_rows or block
        for start in range(0, rows, step):
            piece = np.asarray(values[start : start + step])
            body = np.ascontiguousarray(np.moveaxis(piece, 0, -1) if array.transpose else piece)
            frames.append((zstd.compress(body, array.level), body.nbytes))
            size = max(size, body.nbytes)
    buffer = np.empty(size, np.uint8)

    def raw() -> None:
        for frame, nbytes in frames:
            zstd.decompress(frame, buffer[:nbytes])

    def load() -> None:
        archive.load_view(0, into=packed)

    loading, limit = take_turns(load, raw)
    rng = np.random.default_rng(2)
    picks = [rng.integers(0, rows, 256) for _ in range(200)]
    arrays = list(packed.arrays.values())

    def ours() -> None:
        for pick in picks:
            packed.gather(pick)

    def fancy() -> None:
        for pick in picks:
            for array in arrays:
                array[pick]

    mapped = np.memmap(folder / "rows.bin", np.float16, "w+", shape=(rows, classes))

    def memmap() -> None:
        for pick in picks:
            mapped[pick]

    gathering, indexing, mapping = take_turns(ours, fancy, memmap)
    written = sum(entry.size for entry in archive.contents.files.values())
    per_pick = 256 * len(picks)
    return [
        {"name": "write", "rows_per_second": 2 * rows / seconds, "bytes_per_view": written / (2 * rows)},
        {"name": "load whole view / raw zstd", "ratio": limit / loading, "rows_per_second": rows / loading},
        {
            "name": "gather rows / numpy indexing",
            "ratio": indexing / gathering,
            "rows_per_second": per_pick / gathering,
        },
        {"name": "gather rows / memmap of fp16 logits", "ratio": mapping / gathering},
        {"name": "resident view", "megabytes": packed.nbytes / 2**20, "rows": rows},
    ]


def opening_rows(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """An archive of 10,000 blocks, opened for the first and for the second time on this machine."""
    blocks = 1000 if quick else 10_000
    logits = make_logits(512, 20)
    codec = fit_codec("linear", logits, rounding="plain")
    path = folder / "blocks.redistill.zarr"
    views = blocks // 20  # ten row blocks of views and ten of the teacher, per view
    seconds = write(
        path, rows=160, views=views, classes=20, block_rows=16, codec=codec, encoded=codec.encode(logits[:16])
    )
    before = resident()
    (first,) = take_turns(lambda: open_archive(path), repeats=1)
    (second,) = take_turns(lambda: open_archive(path))
    return [
        {"name": f"open {blocks} blocks, first time", "seconds": first},
        {"name": f"open {blocks} blocks, again", "seconds": second, "megabytes": resident() - before},
        {"name": f"write {blocks} blocks", "blocks_per_second": blocks / seconds},
    ]


def main() -> None:
    args = arguments(__doc__.splitlines()[0]).parse_args()
    folder = Path(tempfile.mkdtemp(prefix="redistill-bench-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        rows = view_rows(folder, args.quick) + opening_rows(folder, args.quick)
    finally:
        shutil.rmtree(folder)
    report("archive", rows, args)


if __name__ == "__main__":
    main()
