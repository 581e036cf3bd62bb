"""The cost of indexing compared with hashing the same files, and of joining 1.28 M samples.

Indexing reads each file once, hashes it and parses its header; `ratio` is its rate over that of a loop that only
reads and hashes the same files, both in one process and with warm caches. Joining is measured in seconds and in
peak memory that numpy and Python allocate, beyond the index and the rows of the archive.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np
from PIL import Image
from redistill_cache.keys import pack_keys

from redistill.sources.folder import FolderSource
from redistill.sources.index import SourceIndex, index_source
from redistill.sources.join import join

CLASSES = 1000


def best(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def write_images(root: Path, n: int) -> None:
    """`n` JPEG files of about 100 kB, as ImageNet has; each differs in its last bytes before the end mark."""
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    picture = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
    picture.save(out, "JPEG", quality=95)
    for i in range(n):
        file = root / f"class{i % 10}" / f"{i:06d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(out.getvalue()[:-2] + i.to_bytes(4, "big") + b"\xff\xd9")


def indexing(n: int) -> harness.Row:
    with tempfile.TemporaryDirectory() as scratch:
        root, cache = Path(scratch) / "data", Path(scratch) / "cache"
        write_images(root, n)
        source = FolderSource(root)
        paths = [root / key for key in source.keys]
        plain = best(lambda: [hashlib.sha256(path.read_bytes()).digest() for path in paths], 3)
        os.environ["XDG_CACHE_HOME"] = str(cache)

        def index_without_cache() -> None:
            shutil.rmtree(cache, ignore_errors=True)
            index_source(source, workers=0)

        ours = best(index_without_cache, 3)
        size = paths[0].stat().st_size
    return {
        "what": "indexing",
        "samples": n,
        "bytes_each": size,
        "plain_sha256_per_s": n / plain,
        "indexed_per_s": n / ours,
        "ratio": plain / ours,
    }


def joining(n: int) -> harness.Row:
    draw = np.random.default_rng(0)
    labels = np.sort(draw.integers(0, CLASSES, n))
    keys = pack_keys(f"n{label:08d}/n{label:08d}_{i}.JPEG" for i, label in enumerate(labels.tolist()))
    digests = draw.integers(0, 256, (n, 32), np.uint8)
    names = tuple(f"n{label:08d}" for label in range(CLASSES))
    order = draw.permutation(n)
    sizes, rows = np.zeros((n, 2), np.uint32), np.arange(n)
    index = SourceIndex(keys.take(order), labels[order], digests[order], sizes, rows, names)

    def work() -> None:
        joined = join(index, keys=keys, labels=labels, digests=digests, class_names=names)
        assert np.array_equal(order[joined.source_row_of_archive_row], rows)

    seconds = best(work, 3)
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"what": "joining", "samples": n, "seconds": seconds, "peak_MB": peak / 1e6}


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0]).parse_args()
    rows = [indexing(200 if args.quick else 5000), joining(100_000 if args.quick else 1_281_167)]
    harness.report("sources", rows, args)


if __name__ == "__main__":
    main()
