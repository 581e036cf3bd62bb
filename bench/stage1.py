"""What stage 1 costs beside the teacher: python bench/stage1.py [--quick] [--json PATH]

blocks over a bare loop    images/s of rendering, asking, encoding and writing blocks until the last of them is on disk,
                           over those of the same workers, the same views and the same forward pass with the answers
                           dropped; the first batch counts twice, as it is asked about again when it is read back
whole command over it      the same for everything: index, check, pilot, canaries and seal, which are paid once
estimated over written     bytes of --dry-run over bytes of the archive

The two loops take turns over the same views; ratios are of medians. Threads are what torch finds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import harness

from redistill.caching import CacheOptions, cache_teacher, estimate_cache
from redistill.caching.pilot import Forward
from redistill.caching.plan import Plan, make_plan
from redistill.caching.run import CacheRun, batches, declare_teacher, write_teacher
from redistill.interrupts import StopRequest
from redistill.progress import NoProgress
from redistill.ranks import Rank


def bare_and_blocks(plan: Plan, *, blocks_first: bool) -> tuple[float, float]:
    """Seconds of asking about every view and dropping what is said, and of making blocks of it.

    Both in the batches of stage 1, with the same workers, which have started and drawn their images by then.
    """
    seconds: dict[str, float] = {}
    with Forward(plan, StopRequest()) as forward:
        there = declare_teacher(forward, None, run := CacheRun(), NoProgress())
        wanted = list(batches(forward, there.writer, there.writer.missing(plan.part)))

        def bare() -> None:
            for _, _, said in forward.answers(wanted):
                last = said["logits"]
            last.sum().item()  # a GPU must be through before the clock is read

        def blocks() -> None:
            write_teacher(forward, there, run, NoProgress())

        bare()
        for part in (blocks, bare) if blocks_first else (bare, blocks):
            start = time.perf_counter()
            part()
            seconds[part.__name__] = time.perf_counter() - start
    return seconds["bare"], seconds["blocks"]


def over_bare(name: str, folder: Path, repeats: int, **options: object) -> list[dict[str, object]]:
    bare, blocks, whole = [], [], []
    for turn in range(repeats):
        outs = [folder / f"{name.replace(' ', '-')}-{turn}-{part}.zarr" for part in ("blocks", "whole")]
        one, other = (CacheOptions(out=out, **options) for out in outs)  # type: ignore[arg-type]  # a table of options
        plan = make_plan(one, Rank())
        for times, seconds in zip((bare, blocks), bare_and_blocks(plan, blocks_first=turn % 2 == 1), strict=True):
            times.append(seconds)
        start = time.perf_counter()
        cache_teacher(other)
        whole.append(time.perf_counter() - start)
    images, base = plan.spec.num_samples * plan.spec.num_views, statistics.median(bare)
    answered = images + plan.options.batch_size
    return [
        {"name": f"blocks over a bare loop, {name}", "ratio": base / statistics.median(blocks) * answered / images,
         "goal": 0.97, "images_per_second": answered / statistics.median(blocks)},
        {"name": f"whole command over it, {name}", "ratio": base / statistics.median(whole),
         "images_per_second": images / statistics.median(whole)},
    ]  # fmt: skip


def resnet50(folder: Path, repeats: int, *, classes: int, n: int, batch_size: int) -> list[dict[str, object]]:
    """At 224 px, one block a view."""
    options = {
        "data": f"synthetic?classes={classes}&size=224&n={n}",
        "teacher": f"torchvision:resnet50?num_classes={classes}&weights=random",
        "recipe": "rrc",
        "views": 2,
    }
    return over_bare(f"ResNet-50 of {classes} classes", folder, repeats, **options, batch_size=batch_size)


def estimated(folder: Path, data: str, teacher: str) -> dict[str, object]:
    options = CacheOptions(data=data, teacher=teacher, views=6, out=folder / "estimated.zarr")
    guess, found = estimate_cache(options), cache_teacher(options)
    return {
        "name": "estimated over written bytes",
        "ratio": guess.total_bytes / found.total_bytes,
        "goal": "0.9 to 1.1",
    }


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    repeats, teacher = 1 if args.quick else 3, "demo:large?num_classes=10&weights=random"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = {"data": f"synthetic?classes=10&n={4096 if args.quick else 8192}", "teacher": teacher, "views": 2}
        rows = over_bare("32 px", folder, repeats, **small)
        rows += resnet50(folder, repeats, classes=10, n=64 if args.quick else 128, batch_size=8)
        if not args.quick:  # many classes are encoded in large pieces, or at a high price: a quarter of an hour
            rows += resnet50(folder, 1, classes=1000, n=512, batch_size=16)
        rows.append(estimated(folder, "synthetic?classes=10&n=2048", teacher))
    harness.report("stage1", rows, args)


if __name__ == "__main__":
    main()
