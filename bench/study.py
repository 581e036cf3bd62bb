"""When does which loss help: python bench/study.py [--quick] [--work DIR] [--jobs 2] [--json PATH] [--plots DIR]

Students of four tasks (study_tasks.py) by loss, temperature, weight, optimiser, size, teacher, number of views,
fidelity of the archive and number of images. One thing at a time is changed from a centre (a small student, SGD, eight
cached views at a fidelity of 1e-3, a sound teacher, KL or the power divergence at T = 4), then loss, temperature and
teacher together. Five seeds.

A cell is one training of a cohort: some losses with all seeds in one pass over the images. Its result, the options it
was trained with and its seconds are in DIR/results, its runs in DIR/runs. With --work, cells that are done are not
repeated and an interrupted one continues. Cells that decide come first, so a study can be read at any time:

    python bench/study.py --work DIR --done --json bench/results/study.json --plots docs/plots

Rows are compared with KL at T = 4 of the same cell's setting by a paired t-test over the seeds, with Holm's correction
for the rows of that setting (study_report.py). Three hours on two cores, two jobs; --quick has two tasks.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import torch
from redistill_cache.storage import LOCAL
from study_gradients import AUDITED, audit
from study_report import at_same_temperature, best_of_two, compared, draw, gradients, summary
from study_tasks import EXACT, TASKS, Lab, Task

from redistill.models import open_weights
from redistill.optim import OptimConfig, preset
from redistill.training import TrainOptions, train
from redistill.training.validate import Validation

BATCH_SIZE = 32
CPU = torch.device("cpu")
SEEDS = (0, 1, 2, 3, 4)
MOST_EPOCHS = 384  # of 50 images, which labels alone have learnt long before
ONLINE = 0
"""As a number of views: a new one in every epoch, from the teacher itself."""
SGD = OptimConfig(opt="nesterov", lr=0.1, weight_decay=5e-4, warmup_epochs=1.0)
OPTIMISERS = {
    "sgd": SGD,
    "adamw": OptimConfig(opt="adamw", lr=0.003, weight_decay=0.05, warmup_epochs=1.0),
    "features": preset("features").optim,
}
CALIBRATED = "power?calibrate=1"

# -- what is trained --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Everything but the loss; the defaults are the centre."""

    task: str
    teacher: str = "sound"
    student: str = "small"
    optimiser: str = "sgd"
    per_class: int = 0
    """Images a class; 0 for the task's."""
    views: int = 8
    fidelity: str = "1e-3"
    length: float = 1.0
    """Epochs, relative to the task's."""


@dataclass(frozen=True)
class Cell:
    axis: str
    setting: Setting
    losses: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the files of its result and its runs."""
        of_losses = hashlib.sha256(repr((self.losses, self.seeds)).encode()).hexdigest()[:8]
        return "_".join(map(str, asdict(self.setting).values())) + f"_{of_losses}"


def kd(loss: str, temperature: float | None = None, weight: float | str | None = None, ce: float | None = None) -> str:
    """A spec string of a loss."""
    options = [f"temperature={temperature:g}"] if temperature else []
    options += [f"weight={weight}"] if weight is not None else []
    name, question, own = loss.partition("?")
    text = "&".join([*([own] if question else []), *options])
    return f"{name}?{text}" + ("" if ce is None else f"+ce?weight={ce:g}")


PAIR = ("kl", "power")
TEMPERATURES = (1, 2, 4, 8)
LABELS = "ce"
AUDIT = "audit"
"""The axis of cells that measure gradients."""
CROSSED = tuple(kd(loss, t) for t in TEMPERATURES for loss in PAIR)
ENDS = tuple(kd(loss, t) for t in (4, 1) for loss in PAIR)
THREE = *ENDS[:2], kd(CALIBRATED, 4)
IMAGES_PER_CLASS = {"digits": (20, 50), "fonts": (5, 20, 100)}
FAMILY = (
    "power?lam=0.3333",
    "power?lam=0.5",
    "power?lam=1",
    "power?form=cressie-read",
    "power?form=density",
    "ab",
    "dkd",
)
PUBLISHED = 0.9


def cells(tasks: Sequence[str]) -> Iterator[Cell]:
    """In the order of what decides; a loss that an earlier cell has trained in a setting is left out."""
    seen: set[tuple[Setting, str, int]] = set()
    for axis, setting, losses, seeds in wanted(tasks):
        if axis == AUDIT:
            yield Cell(axis, setting, losses, seeds)
            continue
        new = tuple(loss for loss in losses if any((setting, loss, seed) not in seen for seed in seeds))
        seen |= {(setting, loss, seed) for loss in new for seed in seeds}
        if new:
            yield Cell(axis, setting, new, seeds)


Wanted = tuple[str, Setting, tuple[str, ...], tuple[int, ...]]


def wanted(tasks: Sequence[str]) -> Iterator[Wanted]:
    """One axis after the other; glyphs10, whose students take the most steps, is left out where two tasks show it."""
    few = [task for task in tasks if task != "glyphs100"]
    wide = [task for task in few if task != "glyphs10"]
    both = ("sound", "misled-20")
    for task in few:
        yield from crossed(task)
    for task in few:
        for teacher in both:
            yield AUDIT, Setting(task, teacher), AUDITED, SEEDS[:1]
    for task in few:
        for length in (0.5, 2.0):
            yield "length", Setting(task, length=length), (LABELS, *ENDS[:2]) if length < 1 else (LABELS,), SEEDS
    for task in few:
        at_4 = FAMILY if task in wide else tuple(loss for loss in FAMILY if "lam" not in loss)
        for teacher in both:
            yield "loss", Setting(task, teacher), tuple(kd(loss, 4) for loss in at_4), SEEDS
        yield "loss", Setting(task, optimiser="features", fidelity=EXACT), ("features", kd("kl", 4)), SEEDS
    for task in few:
        at = (2, 4, 8) if task in wide else (4,)
        for teacher in both:
            yield "loss", Setting(task, teacher), tuple(kd(CALIBRATED, t) for t in at), SEEDS
    if "glyphs100" in tasks:
        losses = tuple(kd(loss, t) for t in (4, 8) for loss in PAIR)
        yield "temperature", Setting("glyphs100"), (LABELS, *losses), SEEDS
        yield "temperature", Setting("glyphs100", "misled-20"), losses, SEEDS
    for task in few:
        for teacher in ("noisy-40", "misled-40"):
            yield "teacher", Setting(task, teacher), THREE, SEEDS
        for views in (1, ONLINE):
            yield "views", Setting(task, views=views), ENDS[:2], SEEDS
    for task in wide:
        for teacher in ("noisy-20", "misled-10", "over-confident", "under-trained"):
            yield "teacher", Setting(task, teacher), THREE, SEEDS
        for views in (2, 4, 16):
            yield "views", Setting(task, views=views), ENDS[:2], SEEDS
    for task in wide:
        yield "optimiser", Setting(task, optimiser="adamw"), (LABELS, *THREE), SEEDS
        for teacher in both:
            yield "student", Setting(task, teacher, student="tiny"), (LABELS, *THREE), SEEDS
    for task in wide:
        yield "student", Setting(task, student="large", length=0.25), (LABELS, *THREE), SEEDS
        weights = [factor * PUBLISHED for factor in (0.5, 2, 4)]
        losses = [kd(loss, t, weight) for loss, t in (("kl", 4), ("power", 4), ("power", 1)) for weight in weights]
        yield "weight", Setting(task), tuple(losses), SEEDS
        for fidelity in ("1e-1", "1e-2", EXACT):
            yield "fidelity", Setting(task, fidelity=fidelity), ENDS[:2], SEEDS
        yield "ce weight", Setting(task), tuple(kd(loss, 4, PUBLISHED, ce) for ce in (0, 0.5) for loss in PAIR), SEEDS
        yield "loss", Setting(task), ("ce?smoothing=0.1",), SEEDS
        for per_class in IMAGES_PER_CLASS[task]:
            yield "images", Setting(task, per_class=per_class), (LABELS, *THREE), SEEDS
    for task in ("fonts", "glyphs100"):
        if task in tasks:
            yield "length", Setting(task, length=4.0), (LABELS,), SEEDS


def crossed(task: str) -> Iterator[Wanted]:
    """Loss, temperature and teacher."""
    yield "temperature", Setting(task), (LABELS, *CROSSED), SEEDS
    yield "temperature", Setting(task, "misled-20"), CROSSED, SEEDS


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    lab: Lab

    def result(self, cell: Cell) -> Path:
        return self.lab.work / "results" / f"{cell.name}.json"

    def run(self, cell: Cell) -> dict[str, Any]:
        """The result of a cell, from an earlier run or from a new one."""
        path = self.result(cell)
        if path.exists():
            saved: dict[str, Any] = json.loads(path.read_text())
            return saved
        torch.set_num_threads(1)  # the networks are too small for more
        options, start = self.options(cell), time.monotonic()
        if cell.axis == AUDIT:
            epochs, (student,) = options.optim.epochs, options.students
            measured = {"gradients": list(audit(options.archive, options.data, student, epochs, cell.seeds[0]))}
        else:
            measured = {"students": self.trained(cell, options)}
        result = {
            "cell": cell.name,
            "axis": cell.axis,
            "setting": asdict(cell.setting),
            "epochs": options.optim.epochs,
            "images": cell_images(cell.setting),
            "seconds": round(time.monotonic() - start, 1),
            **measured,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        LOCAL.publish(path, (json.dumps(result, indent=1) + "\n").encode())
        return result

    def options(self, cell: Cell) -> TrainOptions:
        setting, task = cell.setting, TASKS[cell.setting.task]
        per_class = setting.per_class or task.per_class
        epochs = min(task.epochs * task.per_class / per_class, MOST_EPOCHS) * setting.length
        optim = replace(OPTIMISERS[setting.optimiser], epochs=self.lab.scaled(epochs))
        views = optim.epochs if setting.views == ONLINE else setting.views
        data = self.lab.data(task, "student", per_class)
        archive = self.lab.archive(task, setting.teacher, per_class, views, setting.fidelity)
        return TrainOptions(
            data=data,
            archive=archive,
            students=(f"demo:{setting.student}",),
            out=self.lab.work / "runs" / cell.name,
            losses=cell.losses,
            seeds=cell.seeds,
            batch_size=BATCH_SIZE,
            optim=optim,
            online_teacher=self.lab.teacher(task, setting.teacher) if setting.views == ONLINE else None,
            device="cpu",
            workers=0,
            log=("csv",),
        )

    def trained(self, cell: Cell, options: TrainOptions) -> list[dict[str, Any]]:
        """Train a cohort; the scores of every student, from one pass over the images for validation."""
        train(options)
        students = [open_weights(options.folder(member) / "student.safetensors") for member in options.members]
        with torch.inference_mode():
            checked = validation(self.lab, TASKS[cell.setting.task])
            sums = checked.metric_sums([(s.module, s.normalise()) for s in students], CPU)
        names = [(loss, seed) for loss in cell.losses for seed in cell.seeds]  # in the order of the members
        return [
            {"loss": loss, "seed": seed, "top1": scores.top1, "nll": scores.nll}
            for (loss, seed), scores in zip(names, (of_student.metrics() for of_student in sums), strict=True)
        ]


def cell_images(setting: Setting) -> int:
    task = TASKS[setting.task]
    return (setting.per_class or task.per_class) * task.classes


@lru_cache(maxsize=4)
def validation(lab: Lab, task: Task) -> Validation:
    """Its pixels stay in memory."""
    data = lab.val_data(task)
    return Validation.open(data, class_names=None, num_classes=task.classes, size=task.size)


# -- the study --------------------------------------------------------------------------------------------------------


def report(done: Sequence[dict[str, Any]], args: Any) -> None:  # noqa: ANN401  argparse's namespace
    rows, audited = compared(done), gradients(done)
    time_taken = {"table": "time", "cells": len(done), "seconds": round(sum(result["seconds"] for result in done))}
    tables = [time_taken, *best_of_two(rows), *at_same_temperature(rows), *summary(rows)]
    harness.save("study", [*tables, *rows, *audited], args)
    if args.plots is not None:
        draw(rows, audited, args.plots)


def end_with_parent() -> None:
    """A worker of a study that was killed must not go on beside the one that resumes it."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "only workers call this"
        parent.join()
        os._exit(1)  # as by a kill: checkpoints and results are whole at any moment

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--work", type=Path, default=None, help="folder for everything, to resume from")
    parser.add_argument("--jobs", type=int, default=1, help="cells that are trained at the same time")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--axes", nargs="+", default=None, metavar="AXIS", help="train only cells of these axes")
    parser.add_argument("--done", action="store_true", help="report the cells in --work that are done; train nothing")
    parser.add_argument("--plots", type=Path, default=None, metavar="DIR", help="draw the plots into this folder")
    args = parser.parse_args()
    if "digits" in args.tasks and find_spec("sklearn") is None:
        print("scikit-learn is not installed; the task digits is left out")
        args.tasks.remove("digits")
    if args.quick:
        args.tasks = [task for task in args.tasks if task in ("glyphs10", "digits")]
    with tempfile.TemporaryDirectory() as temporary:
        study = Study(Lab(args.work or Path(temporary), scale=1 / 32 if args.quick else 1.0))
        todo = [cell for cell in cells(args.tasks) if args.axes is None or cell.axis in args.axes]
        if args.quick:
            todo = [replace(cell, seeds=cell.seeds[:2]) for cell in todo if cell.seeds == SEEDS]
        done = {cell: study.run(cell) for cell in todo if study.result(cell).exists()}
        todo = [] if args.done else [cell for cell in todo if cell not in done]
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, spawn, initializer=end_with_parent) as pool:
            running = {pool.submit(study.run, cell): cell for cell in todo}
            for finished in as_completed(running):
                result = done[running[finished]] = finished.result()
                print(f"{len(done)}: {result['cell']}, {result['seconds']:.0f} s", flush=True)
                report(list(done.values()), args)
        report(list(done.values()), args)
        rows = compared(list(done.values()))
        print(harness.table(summary(rows)), harness.table(best_of_two(rows)), sep="\n\n")


if __name__ == "__main__":
    main()
