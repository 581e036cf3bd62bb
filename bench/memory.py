"""Whether the memory of stage 1 grows with the views it writes: python bench/memory.py [--quick] [--json PATH]

Each row is the peak memory of a process that wrote this number of views of 1,024 images and 1,000 classes, 4 MB of
logits per view; the ratio is to the first row, which has enough views to fill every buffer.
bench/stage2.py measures stage 2.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import harness

from redistill.caching import CacheOptions, cache_teacher

DATA, TEACHER = "synthetic?classes=1000&n=1024", "demo:large?num_classes=1000&weights=random"


def peak(out: Path, views: int) -> int:
    cache_teacher(CacheOptions(data=DATA, teacher=TEACHER, views=views, out=out, codec="float16"))
    return harness.peak_memory()


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    peaks: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for views in (10, 25) if args.quick else (10, 25, 50):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                peaks[views] = alone.submit(peak, Path(folder) / f"{views}.redistill.zarr", views).result()
    rows = [
        {
            "name": f"stage 1, {views} views",
            "ratio": size / peaks[10],
            "goal": 1.0,
            "mebibytes": size / 2**20,
        }
        for views, size in peaks.items()
    ]
    harness.report("memory", rows, args)


if __name__ == "__main__":
    main()
