"""Time that the archive adds to a training step: python bench/steps.py [--quick] [--json PATH]

bench/stage2.py compares whole runs, whose times vary with other load on the machine. Here a student with the power
divergence and one with labels alone do single steps on the same batch of 128, in turns of milliseconds, in one process
and one thread, so that load affects both alike. Times are medians over the turns; the order within a turn is random.
Loading takes both the same time, so the ratio of images/s of whole runs is between 1 and

steps       a step with labels alone over one with the archive (gathering and decoding rows), if loading is free
with views  the same with the rendering of the batch added to both, for a machine whose CPU is the limit
control     labels alone over labels alone: 1 on a quiet machine
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import harness
import torch
from stage2 import DRAWN, Bench

from redistill.losses.curriculum import TrainingProgress
from redistill.progress import NoProgress
from redistill.ranks import World, joined_world
from redistill.training import TrainOptions
from redistill.training.feed import TrainBatch
from redistill.training.prepare import TrainSetup, prepare

START = TrainingProgress(0.0, 1)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def step(run: TrainSetup, item: TrainBatch, world: World) -> None:
    """The same as in redistill.training.loop."""
    pixels, labels = item.images.pixels.to(world.device), item.images.labels.to(world.device)
    teacher = None if run.targets is None else run.targets(item.plan, pixels)
    for member in run.members:
        member.step(pixels, teacher, labels, None, START, 1.0)


def step_times(
    data: str, archive: Path, student: str, losses: Sequence[str], turns: int, batch_size: int = 128
) -> list[float]:
    """Seconds of a step with each of the losses, and of rendering the batch."""
    out = archive.parent / "run"
    options = {"data": data, "archive": archive, "students": (student,), "out": out, "batch_size": batch_size}
    with joined_world("auto") as world:
        runs = [
            prepare(TrainOptions(losses=(loss,), workers=0, **options), world, NoProgress())  # type: ignore[arg-type]
            for loss in losses
        ]
        feed = runs[0].feed
        item = next(iter(feed.start(0, 0)))
        for run in runs:
            if run.targets is not None:
                run.targets.begin_epoch(item.plan.views, None)
        indices = [feed.dataset.index(item.plan.views[0], row) for row in range(item.plan.global_size)]
        work: list[Callable[[], object]] = [partial(step, run, item, world) for run in runs]
        work.append(partial(feed.dataset.__getitems__, indices))
        times: list[list[float]] = [[] for _ in work]
        order = random.Random(0)
        for _ in range(turns):
            for at in order.sample(range(len(work)), len(work)):
                times[at].append(seconds(work[at], world.device))
    return [statistics.median(of_work[turns // 10 :]) for of_work in times]


def measure(data: str, archive: Path, student: str, turns: int) -> dict[str, object]:
    power, labels, control, render = step_times(data, archive, student, ("power", "ce", "ce"), turns)
    return {
        "name": f"{student}, {archive.name.partition('.')[0]}",
        "steps": labels / power,
        "with views": (labels + render) / (power + render),
        "control": labels / control,
        "goal": 0.98,
        "ms of a step": 1e3 * labels,
        "ms added": 1e3 * (power - labels),
        "ms of rendering": 1e3 * render,
    }


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    turns = 30 if args.quick else 200
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.quick)
        drawn, jpeg = f"{DRAWN}&n=512", bench.jpegs(256)
        small = bench.archive("32 px drawn", drawn, 2)
        rows = [measure(drawn, small, "demo:small", turns), measure(drawn, small, "cifar:resnet8", turns // 4)]
        for size, most in ((64, turns // 4), (224, turns // 10)):
            archive = bench.archive(f"JPEG at {size} px", jpeg, 2, recipe=f"rrc?size={size}")
            rows.append(measure(jpeg, archive, "demo:small", most))
    harness.report("steps", rows, args)


if __name__ == "__main__":
    main()
