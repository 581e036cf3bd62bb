"""What stage 1 costs beside the teacher: python bench/stage1.py [--quick] [--json PATH]

blocks over a bare loop    images/s of rendering, asking, encoding and writing blocks, over those of the same workers,
                           the same views and the same forward pass with the answers dropped
whole command over it      the same for everything: index, check, pilot, self-test and seal, which are paid once
estimated over written     bytes of --dry-run over bytes of the archive
memory, 50 views over 2    peak memory of a process that writes so many views

The two loops take turns over the same views; ratios are of medians. Threads are what torch finds.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import harness

from redistill.caching import CacheOptions, cache_teacher, estimate_cache
from redistill.caching.forward import answers
from redistill.caching.plan import Plan, make_plan
from redistill.caching.ranks import Rank

MEASURED = "measure-memory"


def bare_loop(plan: Plan) -> float:
    """Images a second of asking about every view, in the batches of stage 1, and dropping what is said."""
    dataset, size = plan.dataset, plan.options.batch_size

    def batches() -> Iterator[tuple[None, list[int]]]:
        for view in range(plan.spec.num_views):
            for first in range(0, plan.spec.num_samples, plan.spec.block_rows):
                last = min(first + plan.spec.block_rows, plan.spec.num_samples)
                for start in range(first, last, size):
                    yield None, [dataset.index(view, row) for row in range(start, min(start + size, last))]

    clock = Clocked()
    images = 0
    for _, said in answers(plan, dataset, batches()):
        said["logits"][0, 0].item()  # a GPU must be through before the clock is read
        images += len(said["logits"])
        clock.advance(images, 0, 0)
    return clock.pace


class Clocked:
    """A watcher that times everything after the first batch: workers have started and kernels are chosen by then.

    Of stage 1, that is from the second block on: the first is written alone and read back.
    """

    def __init__(self) -> None:
        self.first: tuple[float, int] | None = None
        self.last = (0.0, 0)

    def say(self, text: str) -> None:
        del text
        self.first = None  # the last thing said is that the first block reads back

    def warn(self, text: str) -> None: ...
    def index(self, done: int, total: int) -> None: ...

    def advance(self, images: int, total: int, blocks: int) -> None:
        del total, blocks
        self.last = time.perf_counter(), images
        self.first = self.first or self.last

    @property
    def pace(self) -> float:
        assert self.first is not None
        return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0])


def over_bare(name: str, folder: Path, repeats: int, **options: object) -> list[dict[str, object]]:
    asked = CacheOptions(out=folder / "plan.zarr", **options)  # type: ignore[arg-type]  # a table of options
    plan = make_plan(asked, Rank())
    images = plan.spec.num_samples * plan.spec.num_views
    bare, blocks, whole = [], [], []
    for turn in range(repeats):
        bare.append(bare_loop(plan))
        watcher, start = Clocked(), time.perf_counter()
        out = folder / f"{name.replace(' ', '-')}-{turn}.zarr"
        cache_teacher(CacheOptions(out=out, **options), watcher)  # type: ignore[arg-type]  # a table of options
        whole.append(images / (time.perf_counter() - start))
        blocks.append(watcher.pace)
    base = statistics.median(bare)
    return [
        {"name": f"blocks over a bare loop, {name}", "ratio": statistics.median(blocks) / base, "goal": 0.97,
         "images_per_second": statistics.median(blocks)},
        {"name": f"whole command over it, {name}", "ratio": statistics.median(whole) / base,
         "images_per_second": statistics.median(whole)},
    ]  # fmt: skip


def estimated(folder: Path, data: str, teacher: str) -> dict[str, object]:
    options = CacheOptions(data=data, teacher=teacher, views=6, out=folder / "estimated.zarr")
    guess, found = estimate_cache(options), cache_teacher(options)
    return {
        "name": "estimated over written bytes",
        "ratio": guess.total_bytes / found.total_bytes,
        "goal": "0.9 to 1.1",
    }


def peak_memory(folder: Path, views: int, data: str, teacher: str) -> int:
    """KiB, of a process of its own."""
    command = [sys.executable, __file__, MEASURED, str(folder / f"memory-{views}.zarr"), str(views), data, teacher]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    teacher, large = "demo:large?num_classes=10&weights=random", "torchvision:resnet50?num_classes=10&weights=random"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = {"data": f"synthetic?classes=10&n={2048 if args.quick else 8192}", "teacher": teacher, "views": 2}
        rows = over_bare("32 px", folder, 1 if args.quick else 3, **small)
        wide = {"data": f"synthetic?classes=10&size=224&n={48 if args.quick else 192}", "teacher": large, "views": 2}
        rows += over_bare(
            "ResNet-50 at 224 px", folder, 1 if args.quick else 3, **wide, batch_size=16, block_rows=32, recipe="rrc"
        )
        rows.append(estimated(folder, "synthetic?classes=10&n=2048", teacher))
        few, many = (peak_memory(folder, views, "synthetic?classes=10&n=1024", teacher) for views in (2, 50))
        rows.append({"name": "peak memory, 50 views over 2", "ratio": many / few, "goal": 1.0})
    harness.report("stage1", rows, args)


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURED]:
        _, _, out, count, images, network = sys.argv
        cache_teacher(CacheOptions(data=images, teacher=network, views=int(count), out=Path(out)))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    else:
        main()
