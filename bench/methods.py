"""Students by method, on the task of the demo: python bench/methods.py [--quick] [--json PATH] [--work DIR] [--jobs 2]

One teacher (95 % top-1, trained on 30,000 other images), 500 or 2,000 images for the students, eight cached views, 48
epochs, batches of 32, four seeds; top-1 on 2,000 unseen images. Methods on logits are trained with the optimiser of the
demo (SGD with momentum, learning rate 0.1), those on features with the preset `features` (AdamW, one cycle up to
0.0075), and the methods on logits with that too, so that the optimiser does not decide.

A row has the mean and the standard deviation over seeds, the difference from the power divergence with the demo's
optimiser on as many images, and the p-value of a paired t-test of it, multiplied as Holm's method says for the number
of comparisons on as many images.

A cell is one method with all its seeds. With --work, cells that are done are not repeated, and one that was interrupted
continues. At the end, steps with features and with logits are timed in alternation.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import torch
from scipy.stats import ttest_rel
from steps import step_times

from redistill.caching import CacheOptions, cache_teacher
from redistill.demo.run import (
    BATCH_SIZE,
    DIFFICULTY,
    OPTIM,
    RECIPE,
    STUDENT_NETWORK,
    TEACHER_NETWORK,
    TEACHER_WEIGHTS,
    VAL_DATA,
    VIEWS,
)
from redistill.evaluate import evaluate
from redistill.optim import OptimConfig, preset
from redistill.training import TrainOptions, train

TEACHER = f"{TEACHER_NETWORK}&weights={TEACHER_WEIGHTS}"
BASE = "power"
# The three blocks of the highest quality (cache-teacher --rank-layers), in the order of their depth: the last of the
# second stage, and both of the third.
BY_QUALITY = "layer1:layer2,layer2:layer3.2,layer3:layer3"
SIGNALS = ("logits", "layer1", "layer2", "layer3", "penultimate", "layer3.2")
OPTIMISERS = ("demo", "features")


@dataclass(frozen=True)
class Method:
    """A loss, the optimisers it is trained with, and whether it is also trained on 2,000 images."""

    loss: str
    optimisers: tuple[str, ...] = ("features",)
    many_images: bool = False
    options: Mapping[str, object] | None = None
    """Of `TrainOptions`, beside these."""


METHODS = {
    "labels": Method("ce", OPTIMISERS, many_images=True),
    "kl": Method("kl?temperature=4", OPTIMISERS, many_images=True),
    BASE: Method("power?temperature=4", OPTIMISERS, many_images=True),
    "dkd": Method("dkd?temperature=4", OPTIMISERS, many_images=True),
    "features": Method("features", OPTIMISERS, many_images=True),
    "features, head of the teacher": Method("features+ce?weight=0", options={"head": "teacher"}),
    "features, penultimate only": Method("features?pairs=penultimate:penultimate", many_images=True),
    "features, CE reaches the backbone": Method("features?weight=1+ce?on=all"),
    "features, cosine": Method("features?match=cosine"),
    "features, layers by Q": Method(f"features?pairs={BY_QUALITY}"),
    "features + kl": Method("features+kl?temperature=4&weight=1&on=head+ce?on=head"),
    "rkd": Method("rkd"),
    "nd": Method("nd"),
    "vkd": Method("vkd", many_images=True),
    "dcd": Method("dcd"),
    "lelp": Method("lelp"),
    "pesf": Method("pesf"),
    "dual": Method("dual", OPTIMISERS),
    "exit": Method("exit"),
}
# Student, teacher, size of the views, batch and turns of the comparison of steps.
STEPS = (
    (STUDENT_NETWORK, TEACHER, 32, 128, 100),
    ("torchvision:resnet18", "torchvision:resnet34?num_classes=10&weights=random", 64, 32, 12),
)
STEP_SIGNALS = ("logits", "layer1", "layer2", "layer3", "penultimate")
STEP_LOSSES = ("features", "power", "power")


@dataclass(frozen=True)
class Cell:
    images: int
    name: str
    optimiser: str

    def __str__(self) -> str:
        return f"{self.images}-{self.name}-{self.optimiser}".replace(",", "").replace(" ", "-")


@dataclass(frozen=True)
class Study:
    """The folder of archives, runs and results; the seeds, and the length of a run."""

    work: Path
    seeds: tuple[int, ...]
    epochs: int

    def data(self, images: int) -> str:
        return f"synthetic?{DIFFICULTY}&n={images}"

    def archive(self, images: int) -> Path:
        return self.work / f"teacher-{images}.redistill.zarr"

    def cache(self, images: int) -> None:
        options = CacheOptions(
            data=self.data(images),
            teacher=TEACHER,
            views=VIEWS,
            out=self.archive(images),
            recipe=RECIPE,
            signals=SIGNALS,
            device="cpu",
        )
        cache_teacher(options)

    def result(self, cell: Cell) -> Path:
        return self.work / "results" / f"{cell}.json"

    def optim(self, name: str) -> OptimConfig:
        return replace(OPTIM if name == "demo" else preset("features").optim, epochs=self.epochs)

    def run(self, cell: Cell) -> list[float]:
        """Top-1 of every seed, from an earlier run or from a new one."""
        result, method = self.result(cell), METHODS[cell.name]
        if result.exists():
            return list(map(float, json.loads(result.read_text())))
        torch.set_num_threads(1)  # the networks are too small for more
        options = TrainOptions(
            data=self.data(cell.images),
            archive=self.archive(cell.images),
            students=(STUDENT_NETWORK,),
            out=self.work / "runs" / str(cell),
            losses=(method.loss,),
            seeds=self.seeds,
            batch_size=BATCH_SIZE,
            optim=self.optim(cell.optimiser),
            device="cpu",
            workers=1,
            log=("csv",),
            **(method.options or {}),  # type: ignore[arg-type]  # a table of options
        )
        # Validation after every epoch would take twice the time of training.
        students = [options.out / outcome.run / "student.safetensors" for outcome in train(options)]
        top1 = [evaluate(student, VAL_DATA, workers=0).metrics.top1 for student in students]
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(top1))
        return top1


def cells(image_counts: Sequence[int], names: Sequence[str]) -> Iterator[Cell]:
    for images in image_counts:
        for name in names:
            if images == min(image_counts) or METHODS[name].many_images:
                yield from (Cell(images, name, optimiser) for optimiser in METHODS[name].optimisers)


def rows_of(top1_of: Mapping[Cell, list[float]]) -> list[dict[str, object]]:
    """A row for every cell; those on as many images are compared with the power divergence."""
    rows: list[dict[str, object]] = []
    for images in sorted({cell.images for cell in top1_of}):
        here = {cell: top1 for cell, top1 in top1_of.items() if cell.images == images}
        base = here.get(Cell(images, BASE, "demo"))
        others = [cell for cell, top1 in here.items() if base is not None and top1 != base and len(top1) > 1]
        p_of = dict(zip(others, holm([float(ttest_rel(here[c], base).pvalue) for c in others]), strict=True))
        for cell, top1 in here.items():
            method = METHODS[cell.name]
            rows.append(
                {
                    "images": images,
                    "method": cell.name,
                    "optimiser": cell.optimiser,
                    "loss": method.loss,
                    "top1": statistics.mean(top1),
                    "sd": statistics.stdev(top1) if len(top1) > 1 else 0.0,
                    "seeds": len(top1),
                    "difference": None if base is None else statistics.mean(top1) - statistics.mean(base),
                    "p": p_of.get(cell),
                }
            )
    return rows


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: the k-th smallest of n p-values times n - k + 1, at most 1 and not below a smaller one."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for k, at in enumerate(order):
        highest = max(highest, min(1.0, p_values[at] * (len(order) - k)))
        adjusted[at] = highest
    return adjusted


def step_rows(folder: Path, quick: bool) -> list[dict[str, object]]:
    """A step with features over one with logits; the control, logits over logits, should be 1."""
    rows = []
    data = f"synthetic?{DIFFICULTY}&n=256"
    for student, teacher, size, batch_size, turns in STEPS:
        archive, recipe = folder / f"steps-{size}.redistill.zarr", f"rrc?size={size}"
        cache_teacher(CacheOptions(data=data, teacher=teacher, out=archive, recipe=recipe, signals=STEP_SIGNALS))
        turns = 10 if quick else turns
        features, logits, control, _ = step_times(data, archive, student, STEP_LOSSES, turns, batch_size)
        name = f"step with features over one with logits, {student} at {size} px, batch of {batch_size}"
        rows.append({"name": name, "goal": 1.05, "ratio": features / logits, "control": control / logits})
    return rows


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--work", type=Path, default=None, help="folder for archives and runs, to resume from")
    parser.add_argument("--jobs", type=int, default=1, help="cells that are trained at the same time")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--images", nargs="+", type=int, default=[500, 2000], help="sizes of the students' data")
    parser.add_argument("--done", action="store_true", help="report the cells in --work that are done; train nothing")
    args = parser.parse_args()
    image_counts = [100] if args.quick else args.images
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        study = Study(work, seeds=(0, 1) if args.quick else (0, 1, 2, 3), epochs=2 if args.quick else 48)
        todo = list(cells(image_counts, args.only))
        if args.done:
            todo = [cell for cell in todo if study.result(cell).exists()]
            harness.report("methods", rows_of({cell: study.run(cell) for cell in todo}), args)
            return
        for images in image_counts:
            study.cache(images)
        top1_of: dict[Cell, list[float]] = {}
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            running = {pool.submit(study.run, cell): cell for cell in todo}
            for finished in as_completed(running):
                top1_of[running[finished]] = finished.result()
                print(f"{running[finished]}: {', '.join(map(str, finished.result()))}", flush=True)
                ordered = {cell: top1_of[cell] for cell in todo if cell in top1_of}
                harness.save("methods", rows_of(ordered), args)
        torch.set_num_threads(1)
        rows = [*rows_of(ordered), *step_rows(Path(temporary), args.quick)]
    print()
    harness.report("methods", rows, args)


if __name__ == "__main__":
    main()
