"""The overhead of stage 1 compared with the teacher's forward pass: python bench/stage1.py [--quick] [--json PATH]

whole command over a bare loop   images/s of `cache_teacher`, from opening the data to the sealed archive, over images/s
                                 of the same workers, views and forward pass with the logits dropped; without the
                                 seconds of fitting the codecs (fit_seconds), the same for any number of images
blocks over a bare loop          the same for rendering, running the teacher, encoding and writing blocks until the last
                                 one is on disk, as in a long run; the first batch counts twice, because the self-test
                                 computes it again
control                          the bare loop over itself, run before and after the others
estimated over written           bytes of --dry-run over bytes of the archive

All loops of a set run over the same views in turn; ratios are of medians. torch chooses the number of threads. About
three minutes on two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
from pictures import jpeg, picture

from redistill.caching import CacheOptions, cache_teacher, estimate_cache
from redistill.caching.encoder import RunStats
from redistill.caching.pilot import TeacherRunner
from redistill.caching.plan import make_plan
from redistill.caching.run import declare_teacher, teacher_batches, write_teacher
from redistill.interrupts import StopRequest
from redistill.progress import NoProgress
from redistill.shares import Share


def over_bare(
    name: str, folder: Path, repeats: int, *, whole_goal: float | None, **options: object
) -> list[dict[str, object]]:
    """Blocks, and the whole command, over a loop that runs the teacher over every view and drops its logits."""

    def options_of(part: str) -> CacheOptions:
        return CacheOptions(out=folder / f"{name.replace(' ', '-')}-{part}.zarr", **options)  # type: ignore[arg-type]  # a table of options

    seconds: dict[str, list[float]] = {part: [] for part in ("before", "blocks", "whole", "after", "fit")}

    def timed(part: str, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        run()
        seconds[part].append(time.perf_counter() - start)

    for turn in range(repeats):
        # Nothing that an earlier turn has found out about the images is known.
        os.environ["XDG_CACHE_HOME"] = str(folder / f"cache-{name}-{turn}")
        plan = make_plan(options_of(f"blocks-{turn}"), Share())
        with TeacherRunner(plan, StopRequest()) as runner:
            writer = declare_teacher(runner, None, stats := RunStats(), NoProgress())
            runner.kept.clear()
            batches = list(teacher_batches(runner, writer, writer.missing(plan.folder)))

            def bare() -> None:
                for _, _, signals in runner.run(batches):  # noqa: B023  called in this turn
                    logits = signals["logits"]
                logits.sum().item()  # waits for a GPU to finish

            bare()  # workers start, and draw images that are drawn on demand
            timed("before", bare)
            timed("blocks", lambda: write_teacher(runner, writer, stats, NoProgress()))  # noqa: B023  as above
            timed("after", bare)
        os.environ["XDG_CACHE_HOME"] += "-whole"
        whole = options_of(f"whole-{turn}")
        timed("whole", lambda: cache_teacher(whole))  # noqa: B023  as above
        (note,) = (whole.out / "_redistill" / "notes").iterdir()
        seconds["fit"].append(float(json.loads(note.read_bytes())["fit_seconds"]))
        seconds["whole"][-1] -= seconds["fit"][-1]
    images = plan.spec.num_samples * plan.spec.num_views
    median = {part: statistics.median(values) for part, values in seconds.items()}
    bare_seconds, computed = statistics.median(seconds["before"] + seconds["after"]), images + plan.options.batch_size
    return [
        {"name": f"whole command over a bare loop, {name}", "ratio": bare_seconds / median["whole"],
         "goal": whole_goal, "images_per_second": images / median["whole"], "fit_seconds": median["fit"]},
        {"name": f"blocks over a bare loop, {name}", "ratio": bare_seconds / median["blocks"] * computed / images,
         "goal": 0.97, "images_per_second": computed / median["blocks"]},
        {"name": f"control, {name}", "ratio": median["before"] / median["after"]},
    ]  # fmt: skip


def photographs(folder: Path, repeats: int, size: int, count: int) -> list[dict[str, object]]:
    """Files of photographs, 1,000 classes, and a ResNet-18 with random weights."""
    images = folder / "photographs"
    images.mkdir()
    for number in range(count):
        (images / f"{number:04d}.jpg").write_bytes(jpeg(picture(number, size + size // 7, size + size // 7)))
    options = {
        "data": f"folder:{images}?labels=none",
        "teacher": "torchvision:resnet18?num_classes=1000&weights=random",
        "recipe": f"rrc?size={size}",
        "views": 1,
        "batch_size": 64,
    }
    return over_bare(
        f"{count} photographs, ResNet-18 of 1000 classes at {size} px", folder, repeats, whole_goal=0.8, **options
    )


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
    repeats, teacher = 1 if args.quick else 2, "demo:large?num_classes=10&weights=random"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = photographs(folder, repeats, *((64, 256) if args.quick else (224, 500)))
        small = {"data": f"synthetic?classes=10&n={1024 if args.quick else 4096}", "teacher": teacher, "views": 2}
        rows += over_bare("synthetic images at 32 px", folder, repeats, whole_goal=None, **small)
        rows.append(estimated(folder, f"synthetic?classes=10&n={512 if args.quick else 2048}", teacher))
    harness.report("stage1", rows, args)


if __name__ == "__main__":
    main()
