"""Run the demo: every step is the one a user would take, and what is done already is not done again."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from redistill_cache import open_archive
from redistill_cache.errors import Refused
from redistill_cache.inspect import describe
from redistill_cache.storage import LOCAL, disk_trouble

from redistill.caching import CacheOptions, cache_teacher
from redistill.demo.rewriting import mislead, rewrite_logits
from redistill.devices import one_thread
from redistill.evaluate import evaluate
from redistill.optim import OptimConfig
from redistill.progress import Progress
from redistill.report import write_report
from redistill.training import TrainOptions, TrainResult, train

__all__ = [
    "LOSSES",
    "STUDENT_DATA",
    "STUDENT_NETWORK",
    "TEACHER_DATA",
    "TEACHER_NETWORK",
    "TEACHER_WEIGHTS",
    "VAL_DATA",
    "Accuracy",
    "Speed",
    "Storage",
    "Summary",
    "accuracies",
    "run_demo",
]


# -- setting ----------------------------------------------------------------------------------------------------------
#
# The demo's task: ten kinds of drawn glyphs, few images for the students, many for the teacher.

DIFFICULTY = "classes=10&noise=0.3&clutter=0.2&similarity=0"
# Another seed: the teacher has never seen an image of the students.
TEACHER_DATA = f"synthetic?{DIFFICULTY}&n=30000&seed=1"
STUDENT_DATA = f"synthetic?{DIFFICULTY}&n=500"
VAL_DATA = f"synthetic?{DIFFICULTY}&n=2000&split=val"
TEACHER_NETWORK = "demo:large?num_classes=10"
STUDENT_NETWORK = "demo:small"
# Made by examples/train_demo_teacher.py.
TEACHER_WEIGHTS = Path(__file__).with_name("teacher.safetensors")


# -- summary ----------------------------------------------------------------------------------------------------------
#
# What the demo found, for people and machines.

# Under the names of their runs.
LOSSES = ("ce", "kl", "power")


@dataclass(frozen=True)
class Accuracy:
    """Top-1 on unseen images, over seeds."""

    top1_mean: float
    top1_sd: float
    n: int


@dataclass(frozen=True)
class Storage:
    """Bytes of a view of the teacher's answers: as archived, and as they are kept elsewhere."""

    archived: float
    float16: float
    top10: float
    """Ten float16 probabilities and ten int16 classes, which forget the other classes."""


@dataclass(frozen=True)
class Speed:
    """Images a second while training one student."""

    cached: float
    online: float

    @property
    def ratio(self) -> float:
        return self.cached / self.online


@dataclass(frozen=True)
class Summary:
    teacher_top1: float
    students: Mapping[str, Accuracy]
    misled: Mapping[str, Accuracy]
    """The same when a fifth of the teacher's answers is confidently wrong."""
    storage: Storage
    speed: Speed
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": {"top1": self.teacher_top1},
            "students": {name: asdict(found) for name, found in self.students.items()},
            "students_of_misled_teacher": {name: asdict(found) for name, found in self.misled.items()},
            "bytes_per_view": asdict(self.storage),
            "images_per_second": asdict(self.speed) | {"ratio": self.speed.ratio},
            "seconds": self.seconds,
        }


def accuracies(outcomes: Sequence[TrainResult]) -> dict[str, Accuracy]:
    """By loss, from runs named <loss>-<seed>."""
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        assert outcome.top1 is not None, "the demo validates"
        found.setdefault(outcome.run.rpartition("-")[0], []).append(outcome.top1)
    return {
        name: Accuracy(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))
        for name, values in found.items()
    }


# -- run --------------------------------------------------------------------------------------------------------------

VIEWS = 8
RECIPE = "cifar?hflip=0&padding=3&padding_mode=reflect"
SEEDS = (0, 1, 2)
BATCH_SIZE = 32
OPTIM = OptimConfig(opt="nesterov", lr=0.1, weight_decay=5e-4, epochs=48, warmup_epochs=1.0)
MISLED_SHARE = 0.2
ARCHIVE, VAL_ARCHIVE, MISLED = "teacher.redistill.zarr", "val.redistill.zarr", "misled.redistill.zarr"


def run_demo(out: Path, progress: Progress) -> Summary:
    """Everything into `out`; a second call takes up what is there."""
    start = time.monotonic()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "teacher.safetensors").exists())):
        raise Refused(f"{out} is there and is no demo; choose another --out")
    teacher = out / "teacher.safetensors"
    with disk_trouble("write", out):
        out.mkdir(parents=True, exist_ok=True)
        if not teacher.exists():
            LOCAL.publish(teacher, TEACHER_WEIGHTS.read_bytes())
    progress.stage(f"stage 1: the teacher answers once for {VIEWS} views of the students' images")
    cached(out, ARCHIVE, STUDENT_DATA, RECIPE, VIEWS, progress)
    cached(out, VAL_ARCHIVE, VAL_DATA, "center", 1, progress)
    mislead_archive(out)
    progress.stage(
        "stage 2: nine students from the archive in one pass over the images; beside them, six whose teacher is "
        "confidently wrong about a fifth of what it is asked"
    )
    with one_thread():  # two trainings of tiny networks share the cores better than the threads of one
        clean, astray = train_both(run_options(out, ARCHIVE, "runs", LOSSES), misled_options(out), progress)
        progress.stage("the speed of training with the archive, and with the teacher beside the student")
        paces = speed(out, progress)
    found = Summary(
        teacher_top1=evaluate(teacher, VAL_DATA, workers=0).metrics.top1,
        students=accuracies(clean),
        misled={"ce": accuracies(clean)["ce"], **accuracies(astray)},
        storage=storage(out / ARCHIVE),
        speed=paces,
        seconds=time.monotonic() - start,
    )
    LOCAL.publish(out / "summary.json", (json.dumps(found.to_json(), indent=1) + "\n").encode())
    runs = [
        out / folder / outcome.run for folder, some in (("runs", clean), ("runs-misled", astray)) for outcome in some
    ]
    write_report(runs, out / "report.html", archive=out / ARCHIVE, data=STUDENT_DATA)
    return found


def cached(out: Path, name: str, data: str, recipe: str, views: int, progress: Progress) -> None:
    options = CacheOptions(
        data=data,
        teacher=f"{TEACHER_NETWORK}&weights={out / 'teacher.safetensors'}",
        views=views,
        out=out / name,
        recipe=recipe,
        device="cpu",
        licence="CC0-1.0",
    )
    cache_teacher(options, progress)


def mislead_archive(out: Path) -> None:
    if (out / MISLED / "_redistill" / "manifest.json").exists():
        return
    shutil.rmtree(out / MISLED, ignore_errors=True)  # half of one is worth nothing, and it is made in seconds
    archive = open_archive(out / ARCHIVE)
    rewrite_logits(archive, out / MISLED, change=mislead(MISLED_SHARE), changed_how=f"misled {MISLED_SHARE}")


def run_options(out: Path, archive: str, folder: str, losses: Sequence[str]) -> TrainOptions:
    return TrainOptions(
        data=STUDENT_DATA,
        archive=out / archive,
        students=(STUDENT_NETWORK,),
        out=out / folder,
        losses=tuple(losses),
        seeds=SEEDS,
        batch_size=BATCH_SIZE,
        optim=OPTIM,
        val=VAL_DATA,
        val_archive=out / VAL_ARCHIVE,
        device="cpu",
        workers=1,
        log=("csv",),
    )


def misled_options(out: Path) -> TrainOptions:
    """Labels do not hear the teacher, so they are not trained again."""
    return run_options(out, MISLED, "runs-misled", LOSSES[1:])


def train_both(
    here: TrainOptions, beside: TrainOptions, progress: Progress
) -> tuple[list[TrainResult], list[TrainResult]]:
    """Two cohorts at once, the second in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
        other = pool.submit(train, beside)
        return train(here, progress), other.result()


def storage(path: Path) -> Storage:
    archive = open_archive(path)
    (signals,) = describe(archive)["teachers"].values()
    kept = min(10, archive.num_classes)
    return Storage(signals["logits"]["bytes_per_view"], 2.0 * archive.num_classes, 4.0 * kept)


def speed(out: Path, progress: Progress) -> Speed:
    """A few epochs of one student each way."""

    def pace(name: str, teacher: str | None) -> float:
        options = TrainOptions(
            data=STUDENT_DATA,
            archive=out / ARCHIVE,
            students=(STUDENT_NETWORK,),
            out=out / "speed" / name,
            batch_size=BATCH_SIZE,
            optim=OptimConfig(epochs=5),
            online_teacher=teacher,
            device="cpu",
            workers=1,
            log=("csv",),
        )
        train(options, progress)
        rows = (options.out / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("images_per_second")
        return max(float(row.split(",")[column]) for row in rows[2:])  # the first epoch waits for workers to start

    online = f"{TEACHER_NETWORK}&weights={out / 'teacher.safetensors'}"
    return Speed(cached=pace("cached", None), online=pace("online", online))
