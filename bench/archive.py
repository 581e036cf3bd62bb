"""The archive against the limits of the machine: writing, opening, loading whole views, gathering rows.

python bench/archive.py [--quick] [--json PATH] [--logits PATH.npz]

Every ratio compares two ways of doing the same work in one process, in alternation; `ratio` is our speed over that of
the limit. Loading a view reads files into rows in memory. It has two limits: zstd alone, on chunks in memory, into one
buffer that stays in the processor's cache; and reading the same files and decompressing them into as much memory. Both
include every chunk that loading has to read, also those of sparse arrays.

Logits are synthetic, with the spectrum and confidence of a trained network of 1000 classes, or real:
an .npz with `<set>_z` [..., classes], or `<set>_h` [..., features], `<set>_W` and `<set>_b` (z = h W^T + b).
"""

from __future__ import annotations

import argparse
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
from redistill_cache import (
    Archive,
    ArchiveSpec,
    ArchiveWriter,
    ArraySpec,
    PackedView,
    SignalSpec,
    TeacherSpec,
    layout,
    open_archive,
)
from redistill_cache.codecs import Codec, fit_codec
from redistill_cache.storage import LOCAL, Files

REPEATS = 5


def alternate(*jobs: Callable[[], Any], repeats: int = REPEATS) -> list[float]:
    """Median seconds of each job, run in alternation so that noise affects all equally."""
    times: list[list[float]] = [[] for _ in jobs]
    for _ in range(repeats):
        for job, mine in zip(jobs, times, strict=True):
            start = time.perf_counter()
            job()
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in times]


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def write(
    path: Path, spec: ArchiveSpec, codec: Codec, encoded: dict[str, np.ndarray], files: Files = LOCAL
) -> tuple[float, float]:
    """Write an archive whose blocks all hold the same encoded rows; seconds of blocks, and of sealing."""
    rows = spec.num_samples
    writer = ArchiveWriter.create(path, spec, files=files)
    digests = np.random.default_rng(0).integers(0, 256, (rows, 32), dtype=np.uint8)
    keys = [f"sample/{i:08d}" for i in range(rows)]
    writer.write_samples(keys, np.zeros(rows, np.int64), digests, np.full((rows, 2), 64, np.uint32))
    writer.add_teacher(TeacherSpec("net", (SignalSpec.of("logits", codec),)), {"logits": codec.side()})
    start = time.perf_counter()
    for block in writer.missing("teachers/net"):
        writer.write(block, {f"logits/{name}": values[: len(block.rows)] for name, values in encoded.items()})
    written = time.perf_counter() - start
    for block in writer.missing("views"):
        writer.write(block, {"crop": np.zeros((len(block.rows), 4), np.int32)})
    start = time.perf_counter()
    writer.seal()
    return written, time.perf_counter() - start


def make_spec(rows: int, views: int, classes: int, block_rows: int) -> ArchiveSpec:
    crop = ArraySpec("crop", "int32", (4,), transpose=True)
    return ArchiveSpec(
        num_samples=rows, num_views=views, num_classes=classes, block_rows=block_rows, view_arrays=(crop,)
    )


def make_logits(rows: int, classes: int, seed: int) -> np.ndarray:
    """Rows like those of a trained network: few strong directions, a long weak tail, rows of different confidence."""
    model = np.random.default_rng(0)
    rank = min(512, classes // 2)
    sizes = 31 / (1 + (np.arange(rank) / 11) ** 1.3)
    directions = np.linalg.qr(model.normal(size=(classes, rank)))[0].T * sizes[:, None]
    rng = np.random.default_rng(seed)
    strength = np.exp(rng.normal(scale=0.13, size=(rows, 1)))
    return ((rng.normal(size=(rows, rank)) * strength) @ directions).astype(np.float32)


def real_logits(path: Path, classes: int) -> np.ndarray:
    """The rows of the first set in the file that has this many classes."""
    with np.load(path) as file:
        for name in sorted(file):
            kind = name[-2:]
            if kind == "_z" and file[name].shape[-1] == classes:
                return file[name].reshape(-1, classes).astype(np.float32)
            if kind == "_W" and file[name].shape[0] == classes and f"{name[:-2]}_h" in file:
                weight, features = file[name].astype(np.float32), file[f"{name[:-2]}_h"].astype(np.float32)
                return features.reshape(-1, weight.shape[1]) @ weight.T + file[f"{name[:-2]}_b"]
    raise SystemExit(f"{path} has no logits of {classes} classes")


def encoded_block(codec: Codec, logits: np.ndarray, rows: int) -> dict[str, np.ndarray]:
    """A block of rows sampled from a few encoded ones: column by column their statistics are the same."""
    pick = np.random.default_rng(3).integers(0, len(logits), rows)
    arrays = {name: np.asarray(values) for name, values in codec.encode(logits).arrays.items()}
    return {
        name: values[pick] if any(values.strides) else values[:1].repeat(rows, 0) for name, values in arrays.items()
    }


Chunk = tuple[int, int, int, int]  # offset and size in the file, offset and size in memory


def stored_chunks(archive: Archive, packed: PackedView) -> tuple[dict[Path, list[Chunk]], int]:
    """Every chunk that loading view 0 reads, by file, and the bytes they decode to."""
    arrays = layout.teacher_arrays(archive.spec, archive.teacher())
    chunks: dict[Path, list[Chunk]] = {}
    total = 0
    for name in [*packed.arrays, *packed.sparse]:
        array = arrays[f"logits/{name}"]
        needed = (
            np.flatnonzero(packed.sparse[name][0] >= 0) if name in packed.sparse else np.arange(archive.num_samples)
        )
        for number in np.unique(needed // array.chunk_rows).tolist():
            shard, chunk = divmod(number * array.chunk_rows, array.shard_rows)
            path = archive.path / array.shard_path(0, shard)
            with path.open("rb") as file:
                file.seek(-array.index_bytes, os.SEEK_END)
                index = np.frombuffer(file.read(array.index_bytes - 4), "<u8").reshape(-1, 2)
            offset, size = index[chunk // array.chunk_rows].tolist()
            chunks.setdefault(path, []).append((offset, size, total, array.chunk_bytes))
            total += array.chunk_bytes
    return chunks, total


def loading_limits(archive: Archive, packed: PackedView) -> tuple[Callable[[], None], Callable[[], None]]:
    """zstd alone, and reading and decompressing the same files into as much memory."""
    chunks, total = stored_chunks(archive, packed)
    frames = [
        (path.read_bytes()[o : o + size], nbytes) for path, parts in chunks.items() for o, size, _, nbytes in parts
    ]
    hot = np.empty(max(nbytes for _, nbytes in frames), np.uint8)
    stored, memory = np.empty(max(len(frame) for frame, _ in frames), np.uint8), np.zeros(total, np.uint8)

    def alone() -> None:
        for frame, nbytes in frames:
            zstd.decompress(frame, hot[:nbytes])

    def from_files() -> None:
        for path, parts in chunks.items():
            with path.open("rb", buffering=0) as file:
                for offset, size, place, nbytes in parts:
                    os.preadv(file.fileno(), [stored[:size].data], offset)
                    zstd.decompress(stored[:size], memory[place : place + nbytes])

    return alone, from_files


def view_rows(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole views and random rows."""
    classes, pilot, encoded, rows = (200, 1024, 512, 16384) if args.quick else (1000, 4096, 2048, 65536)
    if args.logits is None:
        known, fresh = make_logits(pilot, classes, 1), make_logits(encoded, classes, 2)
    else:
        classes = 1000
        logits = real_logits(args.logits, classes)
        known, fresh = logits[:-encoded][:pilot], logits[-encoded:]
    codec = fit_codec("linear", known)
    block = encoded_block(codec, fresh, rows)
    path = folder / "view.redistill.zarr"
    seconds, _ = write(path, make_spec(rows, 1, classes, rows), codec, block)
    archive = open_archive(path)
    packed = archive.load_view(0)  # hashes the files, once per machine
    loading, alone, from_files = alternate(lambda: archive.load_view(0, into=packed), *loading_limits(archive, packed))
    written = sum(entry.size for name, entry in archive.state.files.items() if "/logits/" in name)
    sparse = {f"rows with {name}": len(values) / rows for name, (_, values) in packed.sparse.items()}
    return [
        {"name": "write", "rows_per_second": rows / seconds, "bytes_per_view": written / rows, **sparse},
        {"name": "load whole view / zstd alone", "ratio": alone / loading, "rows_per_second": rows / loading},
        {"name": "load whole view / zstd from files", "ratio": from_files / loading},
        *gathering_rows(folder, packed, classes),
        {"name": "resident view", "megabytes": packed.nbytes / 2**20, "rows": rows},
    ]


def gathering_rows(folder: Path, packed: PackedView, classes: int) -> list[dict[str, Any]]:
    """Batches of 256 random rows."""
    rng = np.random.default_rng(2)
    picks = [rng.integers(0, len(packed), 256) for _ in range(200)]
    arrays = list(packed.arrays.values())
    mapped = np.memmap(folder / "rows.bin", np.float16, "w+", shape=(len(packed), classes))
    mapped[...] = 1

    def ours() -> None:
        for pick in picks:
            packed.gather(pick)

    def fancy() -> None:
        for pick in picks:
            for array in arrays:
                array[pick]
            for places, values in packed.sparse.values():
                values[places[pick]]

    def memmap() -> None:
        for pick in picks:
            mapped[pick]

    gathering, indexing, mapping = alternate(ours, fancy, memmap)
    speed = 256 * len(picks) / gathering
    return [
        {"name": "gather rows / numpy indexing", "ratio": indexing / gathering, "rows_per_second": speed},
        {"name": "gather rows / memmap of fp16 logits", "ratio": mapping / gathering},
    ]


class NoSync(Files):
    """A disk without fsync, whose speed is not to be measured."""

    def sync_file(self, path: Path) -> None:
        pass

    def sync_directory(self, path: Path) -> None:
        pass


def opening_rows(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """An archive of 10,000 blocks, opened for the first and for the second time on this machine."""
    blocks = 1000 if quick else 10_000
    logits = make_logits(512, 20, 1)
    codec = fit_codec("linear", logits, rounding="plain")
    encoded = {name: np.asarray(values) for name, values in codec.encode(logits[:16]).arrays.items()}
    path = folder / "blocks.redistill.zarr"
    views = blocks // 20  # ten row blocks of views and ten of the teacher, per view
    _, sealing = write(path, make_spec(160, views, 20, 16), codec, encoded, NoSync())
    before = resident()
    (first,) = alternate(lambda: open_archive(path), repeats=1)
    archive = open_archive(path)
    grown = resident() - before
    (second,) = alternate(lambda: open_archive(path))
    return [
        {"name": f"open {blocks} blocks, first time", "seconds": first, "files": len(archive.state.files)},
        {"name": f"open {blocks} blocks, again", "seconds": second, "megabytes": grown},
        {"name": f"seal {blocks} blocks", "seconds": sealing},
    ]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--logits", type=Path, default=None, metavar="PATH", help="an .npz of real logits")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="redistill-bench-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        rows = view_rows(folder, args) + opening_rows(folder, args.quick)
    finally:
        shutil.rmtree(folder)
    report("archive", rows, args)


if __name__ == "__main__":
    main()
