"""The overhead of stage 1 compared with the teacher's forward pass: python bench/stage1.py [--quick] [--json PATH]

blocks over a bare loop    images/s of rendering, running the teacher, encoding and writing blocks until the last one is
                           on disk, over images/s of the same workers, views and forward pass with the logits dropped;
                           the first batch counts twice, because the self-test computes it again
whole command over it      the same for the whole command: index, check, pilot, canaries and seal are done once;
                           without the seconds of fitting the codecs, which do not depend on the number of images and
                           are in the column fit_seconds
control                    the bare loop over itself, run before and after the blocks
estimated over written     bytes of --dry-run over bytes of the archive

The two loops alternate over the same views; ratios are of medians. torch chooses the number of threads. The signals
that the pilot of a small set computed already are dropped before the blocks are timed, but not in the whole command.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import harness

from redistill.caching import CacheOptions, cache_teacher, estimate_cache
from redistill.caching.encoder import RunStats
from redistill.caching.pilot import TeacherRunner
from redistill.caching.plan import Plan, make_plan
from redistill.caching.run import declare_teacher, teacher_batches, write_teacher
from redistill.interrupts import StopRequest
from redistill.progress import NoProgress
from redistill.shares import Share


def bare_and_blocks(plan: Plan) -> tuple[list[float], float]:
    """Seconds of running the teacher over every view and dropping its logits, before and after writing them in blocks.

    Both use the batches of stage 1 and the same workers, which have started and drawn their images before.
    """
    seconds: dict[str, list[float]] = {"bare": [], "blocks": []}
    with TeacherRunner(plan, StopRequest()) as runner:
        writer = declare_teacher(runner, None, stats := RunStats(), NoProgress())
        batches = list(teacher_batches(runner, writer, writer.missing(plan.folder)))

        def bare() -> None:
            for _, _, signals in runner.run(batches):
                logits = signals["logits"]
            logits.sum().item()  # waits for a GPU to finish

        def blocks() -> None:
            write_teacher(runner, writer, stats, NoProgress())

        bare()
        runner.kept.clear()
        for part in (bare, blocks, bare):
            start = time.perf_counter()
            part()
            seconds[part.__name__].append(time.perf_counter() - start)
    return seconds["bare"], seconds["blocks"][0]


def over_bare(
    name: str, folder: Path, repeats: int, *, whole_goal: float | None = None, **options: object
) -> list[dict[str, object]]:
    bare, again, blocks, whole, fits = [], [], [], [], []
    for turn in range(repeats):
        outs = [folder / f"{name.replace(' ', '-')}-{turn}-{part}.zarr" for part in ("blocks", "whole")]
        blocks_options, whole_options = (CacheOptions(out=out, **options) for out in outs)  # type: ignore[arg-type]  # a table of options
        plan = make_plan(blocks_options, Share())
        (before, after), seconds = bare_and_blocks(plan)
        bare.append(before)
        again.append(after)
        blocks.append(seconds)
        start = time.perf_counter()
        cache_teacher(whole_options)
        fits.append(fit_seconds(whole_options.out))
        whole.append(time.perf_counter() - start - fits[-1])
    images, base = plan.spec.num_samples * plan.spec.num_views, statistics.median(bare + again)
    computed = images + plan.options.batch_size
    return [
        {"name": f"blocks over a bare loop, {name}", "ratio": base / statistics.median(blocks) * computed / images,
         "goal": 0.97, "images_per_second": computed / statistics.median(blocks)},
        {"name": f"whole command over it, {name}", "ratio": base / statistics.median(whole), "goal": whole_goal,
         "images_per_second": images / statistics.median(whole), "fit_seconds": statistics.median(fits)},
        {"name": f"control, {name}", "ratio": statistics.median(bare) / statistics.median(again)},
    ]  # fmt: skip


def fit_seconds(archive: Path) -> float:
    (note,) = (archive / "_redistill" / "notes").iterdir()
    return float(json.loads(note.read_bytes())["fit_seconds"])


def resnet50(folder: Path, repeats: int, *, classes: int, n: int, batch_size: int) -> list[dict[str, object]]:
    """At 224 px, one block per view."""
    options = {
        "data": f"synthetic?classes={classes}&size=224&n={n}",
        "teacher": f"torchvision:resnet50?num_classes={classes}&weights=random",
        "recipe": "rrc",
        "views": 2,
    }
    return over_bare(f"ResNet-50 of {classes} classes", folder, repeats, **options, batch_size=batch_size)


def small_set(folder: Path, repeats: int, size: int) -> list[dict[str, object]]:
    """500 images of 1,000 classes and a ResNet-18 with random weights."""
    options = {
        "data": f"synthetic?classes=1000&size={size}&n=500",
        "teacher": "torchvision:resnet18?num_classes=1000&weights=random",
        "recipe": f"rrc?size={size}",
        "views": 1,
    }
    name = f"500 images of 1,000 classes, ResNet-18 at {size} px"
    return over_bare(name, folder, repeats, **options, batch_size=64, whole_goal=0.8)


def estimated(folder: Path, data: str, teacher: str) -> dict[str, object]:
    options = CacheOptions(data=data, teacher=teacher, views=6, out=folder / "estimated.zarr")
    estimate, result = estimate_cache(options), cache_teacher(options)
    return {
        "name": "estimated over written bytes",
        "ratio": estimate.total_bytes / result.total_bytes,
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
        for size in (64,) if args.quick else (64, 224):
            rows += small_set(folder, repeats, size)
        if not args.quick:  # takes a quarter of an hour: with many classes, encoding costs much unless pieces are large
            rows += resnet50(folder, 1, classes=1000, n=512, batch_size=16)
        rows.append(estimated(folder, "synthetic?classes=10&n=2048", teacher))
    harness.report("stage1", rows, args)


if __name__ == "__main__":
    main()
