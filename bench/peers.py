"""The archive compared with other formats for logits: python bench/peers.py [--quick] [--json PATH] [--logits PATH.npz]

Every format writes the same rows (1,000 classes) and reads them in batches of 256 in one process and one thread, in
alternation with np.memmap of float16: `x ...` is its speed relative to np.memmap (for bytes: its size relative to
np.memmap), and `ratio` is that of shuffled epochs. np.memmap is also measured against itself: its ratios are 1 but for
noise. The page cache is warm throughout; only the archive calls fsync.

bytes per view  all files over all views, eight per image; what an archive writes once, the basis of its codec, is
                spread over a million views, and its sample index (64 bytes per image) is not
write           from float32 rows in memory; the archive's time includes encoding in one thread, not fitting
sequential      all epochs in the order of the files; rows arrive as they are stored
shuffled        all epochs as users of the format shuffle; the archive's time includes loading every view
random batch    256 rows of a view that is not in memory
dense           from a stored batch to float32 rows for a loss
KL              from the original to the stored rows, mean, at T = 1 and 4

Logits are synthetic, like those of a trained network, or real: --logits takes the files that bench/archive.py takes.
Rows are sampled from a thousand, with a little noise added to each, so that no format can compress repetition. The
packages of the other formats: redistill[peers].
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything starts threads

import argparse
import importlib.util
import json
import logging
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import numpy as np
from archive import make_logits, real_logits
from harness import arguments, save, table
from peer_formats import BATCH, LIMIT, PEERS, ArchiveRows, Format, Reader, Rows
from redistill_cache.codecs import fit_codec, kl_rows

CLASSES = 1000
MILLION = 1_000_000
TURNS, ENOUGH = 40, 1.5  # rounds, or seconds
COLUMNS = {  # of the printed tables; the JSON has all in one
    "content": ("name", "stores", "kl_t1", "kl_t4", "bytes_per_view", "x bytes"),
    "writing, rows/s, and opening": ("name", "write", "x write", "open_ms", "x open"),
    "reading, rows/s": ("name", "sequential", "x sequential", "shuffled", "x shuffled", "batch_ms", "x batch", "dense"),
}


class Measurement:
    """Measures formats: holds the rows, a folder on disk, and np.memmap for comparison."""

    def __init__(self, folder: Path, rows: Rows) -> None:
        self.folder, self.rows = folder, rows
        self.limit_writes: list[float] = []
        self.limit_folder = folder / "limit"
        self._write_limit(self.limit_folder)
        self.limit = LIMIT.open(self.limit_folder)

    def _write_limit(self, folder: Path) -> None:
        folder.mkdir()
        self.limit_writes.append(seconds(lambda: LIMIT.write(folder, self.rows)))

    def write(self, form: Format, folder: Path) -> dict[str, float]:
        self._write_limit(folder)
        shutil.rmtree(folder)
        folder.mkdir()
        start = time.perf_counter()
        written = form.write(folder, self.rows)
        took = time.perf_counter() - start + written.owed_seconds
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        views = self.rows.pick.size
        grows = size - written.fixed_bytes
        return {
            "bytes_per_view": grows / views + written.fixed_bytes / MILLION,
            "bytes_per_view_here": size / views,
            "write": views / took,
        }

    def read(self, form: Format, reader: Reader) -> dict[str, float | None]:
        result: dict[str, float | None] = {}
        images = np.random.default_rng(4).permutation(self.rows.images)[:BATCH]
        if reader.batch(0, images) is not None:
            mine, limit, _ = in_turns(lambda: reader.batch(0, images), lambda: self.limit.batch(0, images))
            result |= {"batch_ms": 1e3 * mine, "x batch": limit / mine}
        for name, seed in (("sequential", None), ("shuffled", 5)):
            result |= self._epochs(name, reader, seed)
        views, images, values = next(reader.epochs(None))
        dense = form.dense(values, CLASSES)
        took = statistics.median(seconds(lambda: form.dense(values, CLASSES)) for _ in range(5))
        known = self.rows.known[self.rows.pick[views, images]]
        exact = known if isinstance(form, ArchiveRows) and form.known_only else self.rows.logits[views, images]
        one, four = (float(np.mean(kl_rows(exact, dense, t))) for t in (1.0, 4.0))
        return result | {"dense": len(dense) / took, "kl_t1": one, "kl_t4": four}

    def _epochs(self, name: str, reader: Reader, seed: int | None) -> dict[str, float]:
        """Rows per second, and the ratio to np.memmap. The first pass, which hashes files, is reported too."""

        def passing(source: Reader) -> Callable[[], None]:
            def epochs() -> None:
                shuffle = None if seed is None else np.random.default_rng(seed)
                count = sum(len(images) for _, images, _ in source.epochs(shuffle))
                assert count == self.rows.pick.size, f"read {count} rows of {self.rows.pick.size}"

            return epochs

        mine, limit, first = in_turns(passing(reader), passing(self.limit))
        rates = {name: mine, f"first {name}": first} if seed is None else {name: mine}
        return {key: self.rows.pick.size / took for key, took in rates.items()} | {f"x {name}": limit / mine}

    def measure(self, form: Format) -> dict[str, Any]:
        folder = self.folder / "peer"
        try:
            result: dict[str, Any] = self.write(form, folder)
            opened = [seconds(lambda: form.open(folder).close()) for _ in range(5)]
            reader = form.open(folder)
            result |= {"first_open_ms": 1e3 * opened[0], "open_ms": 1e3 * statistics.median(opened)}
            result |= self.read(form, reader)
            reader.close()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return {"name": form.name, "ratio": result["x shuffled"], "stores": form.stores, **result, "note": form.note}


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def in_turns(mine: Callable[[], object], limit: Callable[[], object]) -> tuple[float, float, float]:
    """Median seconds of both, in alternation, for TURNS rounds or ENOUGH seconds; and the first of `mine`."""
    times: tuple[list[float], list[float]] = ([], [])
    while len(times[0]) < TURNS and sum(times[0]) < ENOUGH:
        for job, result in zip((mine, limit), times, strict=True):
            result.append(seconds(job))
    return statistics.median(times[0]), statistics.median(times[1]), times[0][0]


def formats(pilot: np.ndarray, quick: bool) -> Iterator[tuple[Format, dict[str, Any]]]:
    """Every format, with extra columns; the codecs are fitted to rows that the archive does not store."""
    yield LIMIT, {}
    for form in PEERS:
        yield form, {}
    plain = fit_codec("float16", pilot)
    yield ArchiveRows("archive, float16", "all logits less the largest, float16", plain, known_only=False), {}
    for certified, bound in ((False, "in the mean"),) if quick else ((False, "in the mean"), (True, "in every row")):
        start = time.perf_counter()
        codec = fit_codec("linear", pilot, fidelity=1e-3, certified=certified)
        name = "archive, linear 1e-3" + (", certified" if certified else "")
        fitting = {"fit_seconds": time.perf_counter() - start}
        yield ArchiveRows(name, f"all logits, KL <= 1e-3 {bound}", codec, known_only=True), fitting


def shares(result: list[dict[str, Any]], limit_write: float) -> None:
    """Columns that compare with np.memmap, once that has been measured."""
    limit = result[0]
    for row in result:
        row["x write"] = row["write"] / limit_write
        row["x bytes"] = row["bytes_per_view"] / limit["bytes_per_view"]
        row["x open"] = limit["open_ms"] / row["open_ms"]


def students() -> list[dict[str, Any]]:
    """Effect of lossy rows on students: measured by bench/accuracy.py, on the ten classes of the demo."""
    path = Path(__file__).resolve().parent / "results" / "accuracy.json"
    if path.exists():
        result = [row for row in json.loads(path.read_text())["rows"] if row["study"] == "codec"]
        if result:
            keys = ("loss", "ratio", "top1", "sd", "seeds", "difference", "p")
            return [{"name": f"student of {row['name']}", **{key: row[key] for key in keys}} for row in result]
    print("\nstudents trained from each format at T = 1 and 4: run python bench/accuracy.py --study codec")
    return []


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--logits", type=Path, default=None, metavar="PATH", help="an .npz of real logits")
    parser.add_argument("--disk", type=Path, default=None, metavar="DIR", help="where to write (the temporary folder)")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")  # of the packages of other formats
    views, images, known, pilot = (4, 1024, 128, 4096) if args.quick else (8, 4096, 1024, 4096)
    logits = make_logits(pilot + known, CLASSES, 1) if args.logits is None else real_logits(args.logits, CLASSES)
    folder = Path(tempfile.mkdtemp(prefix="redistill-peers-", dir=args.disk))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # so that no file of the archive is marked as verified
    print(f"{views} views of {images} images in {folder.parent}, warm page cache, one thread\n", flush=True)
    result, missing = [], []
    try:
        measurement = Measurement(folder, Rows.drawn(logits[-known:], views, images))
        for form, more in formats(logits[:-known][:pilot], args.quick):
            if form.needs and importlib.util.find_spec(form.needs) is None:
                missing.append({"name": form.name, "ratio": None, "note": f"left out: {form.needs} is not installed"})
                print(f"{form.name}: left out, needs {form.needs} (pip install 'redistill[peers]')", flush=True)
                continue
            result.append({**measurement.measure(form), **more, "package": package_of(form)})
            print(f"{form.name}: {result[-1]['shuffled']:.4g} rows/s shuffled", flush=True)
    finally:
        shutil.rmtree(folder)
    shares(result, views * images / statistics.median(measurement.limit_writes))
    for title, columns in COLUMNS.items():
        print(f"\n{title}\n{table([{key: row.get(key) for key in columns} for row in result])}")
    for row in result:
        print(f"{row['name']}: {row['note']}")
    accuracy = students()
    print(f"\n{table(accuracy)}" if accuracy else "")
    save("peers", [*result, *missing, *accuracy], args)


def package_of(form: Format) -> str | None:
    if not form.needs:
        return None
    name = packages_distributions()[form.needs][0]
    return f"{name} {version(name)}"


if __name__ == "__main__":
    main()
