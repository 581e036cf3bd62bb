"""The demo: the steps a user would take, on a small synthetic task. Finished steps are not repeated.

The task is to classify ten kinds of glyphs, with few images for the students and many for the teacher.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
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
from redistill.optim import OptimConfig, preset
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

DIFFICULTY = "classes=10&noise=0.3&clutter=0.2&similarity=0"
# Another seed, so that the teacher was not trained on the students' images.
TEACHER_DATA = f"synthetic?{DIFFICULTY}&n=30000&seed=1"
STUDENT_DATA = f"synthetic?{DIFFICULTY}&n=500"
VAL_DATA = f"synthetic?{DIFFICULTY}&n=2000&split=val"
TEACHER_NETWORK = "demo:large?num_classes=10"
STUDENT_NETWORK = "demo:small"
# Written by examples/train_demo_teacher.py.
TEACHER_WEIGHTS = Path(__file__).with_name("teacher.safetensors")

VIEWS = 8
RECIPE = "cifar?hflip=0&padding=3&padding_mode=reflect"
# The ends of the teacher's stages, for the loss on features; the third, pooled, is the input of its last layer.
SIGNALS = ("logits", "layer1", "layer2", "penultimate")
LOSSES = ("ce", "kl", "power")
SEEDS = (0, 1, 2)
BATCH_SIZE = 32
OPTIM = OptimConfig(opt="nesterov", lr=0.1, weight_decay=5e-4, epochs=48, warmup_epochs=1.0)
# The loss on features was published with this optimiser, and fails with that of the other losses.
FEATURES = "features"
FEATURES_OPTIM = replace(preset("features").optim, epochs=OPTIM.epochs)
MISLED_SHARE = 0.2
ARCHIVE, VAL_ARCHIVE, MISLED_ARCHIVE = "teacher.redistill.zarr", "val.redistill.zarr", "misled.redistill.zarr"
RUNS, FEATURES_RUNS, MISLED_RUNS = "runs", "runs-features", "runs-misled"


def run_demo(out: Path, progress: Progress) -> Summary:
    """Run all steps and write everything into `out`; a second call resumes."""
    start = time.monotonic()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "teacher.safetensors").exists())):
        raise Refused(f"{out} exists and is not a demo folder; choose another --out")
    teacher = out / "teacher.safetensors"
    with disk_trouble("write", out):
        out.mkdir(parents=True, exist_ok=True)
        if not teacher.exists():
            LOCAL.publish(teacher, TEACHER_WEIGHTS.read_bytes())
    progress.stage(f"stage 1: run the teacher once over {VIEWS} views of the students' images")
    write_archive(out, ARCHIVE, STUDENT_DATA, RECIPE, VIEWS, progress, signals=SIGNALS)
    write_archive(out, VAL_ARCHIVE, VAL_DATA, "center", 1, progress)
    write_misled_archive(out)
    progress.stage(
        "stage 2: train nine students on the teacher's logits in one pass over the images and, in parallel, three on "
        "its features, and six more on the logits of a misled teacher, which is confidently wrong on "
        f"{MISLED_SHARE:.0%} of the views"
    )
    with one_thread():  # two trainings of tiny networks use two cores better than one training with two threads
        # Training on labels does not depend on the teacher, so it is not repeated with the misled one.
        features = replace(train_options(out, ARCHIVE, FEATURES_RUNS, (FEATURES,)), optim=FEATURES_OPTIM)
        misled = train_options(out, MISLED_ARCHIVE, MISLED_RUNS, LOSSES[1:])
        results, (features_results, misled_results) = train_in_parallel(
            train_options(out, ARCHIVE, RUNS, LOSSES), (features, misled), progress
        )
        progress.stage("measure training speed, from the archive and with an online teacher")
        speed = measure_speed(out, progress)
    students = accuracies([*results, *features_results])
    summary = Summary(
        teacher_top1=evaluate(teacher, VAL_DATA, workers=0).metrics.top1,
        students=students,
        misled={"ce": students["ce"], **accuracies(misled_results)},
        storage=storage_of(out / ARCHIVE),
        speed=speed,
        seconds=time.monotonic() - start,
    )
    LOCAL.publish(out / "summary.json", (json.dumps(summary.to_json(), indent=1) + "\n").encode())
    runs = [
        out / folder / result.run
        for folder, of_cohort in ((RUNS, results), (FEATURES_RUNS, features_results), (MISLED_RUNS, misled_results))
        for result in of_cohort
    ]
    write_report(runs, out / "report.html", archive=out / ARCHIVE, data=STUDENT_DATA)
    return summary


# -- steps ------------------------------------------------------------------------------------------------------------


def write_archive(
    out: Path, name: str, data: str, recipe: str, views: int, progress: Progress, signals: tuple[str, ...] = SIGNALS[:1]
) -> None:
    options = CacheOptions(
        data=data,
        teacher=f"{TEACHER_NETWORK}&weights={out / 'teacher.safetensors'}",
        views=views,
        out=out / name,
        recipe=recipe,
        signals=signals,
        device="cpu",
        licence="CC0-1.0",
    )
    cache_teacher(options, progress)


def write_misled_archive(out: Path) -> None:
    path = out / MISLED_ARCHIVE
    if (path / "_redistill" / "manifest.json").exists():
        return
    shutil.rmtree(path, ignore_errors=True)  # rewriting takes seconds, so an incomplete archive is not resumed
    archive = open_archive(out / ARCHIVE)
    rewrite_logits(archive, path, change=mislead(MISLED_SHARE), changed_how=f"misled {MISLED_SHARE}")


def train_options(out: Path, archive: str, runs: str, losses: Sequence[str]) -> TrainOptions:
    return TrainOptions(
        data=STUDENT_DATA,
        archive=out / archive,
        students=(STUDENT_NETWORK,),
        out=out / runs,
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


def train_in_parallel(
    options: TrainOptions, others: Sequence[TrainOptions], progress: Progress
) -> tuple[list[TrainResult], list[list[TrainResult]]]:
    """Train a cohort here and, at the same time, others in a process of their own, one after another."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
        waiting = [pool.submit(train, other) for other in others]
        return train(options, progress), [other.result() for other in waiting]


def measure_speed(out: Path, progress: Progress) -> Speed:
    """Train one student for a few epochs with the archive, and for a few with the teacher."""

    def images_per_second(name: str, teacher: str | None) -> float:
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

    online_teacher = f"{TEACHER_NETWORK}&weights={out / 'teacher.safetensors'}"
    return Speed(cached=images_per_second("cached", None), online=images_per_second("online", online_teacher))


def storage_of(path: Path) -> Storage:
    archive = open_archive(path)
    (signals,) = describe(archive)["teachers"].values()
    top = min(10, archive.num_classes)
    bytes_of = {name: float(signal["bytes_per_view"]) for name, signal in signals.items()}
    features = sum(bytes_of[name] for name in SIGNALS[1:])
    return Storage(bytes_of["logits"], features, 2.0 * archive.num_classes, 4.0 * top)


def accuracies(results: Sequence[TrainResult]) -> dict[str, Accuracy]:
    """By loss, from runs named <loss>-<seed>."""
    top1_by_loss: dict[str, list[float]] = {}
    for result in results:
        assert result.top1 is not None, "the demo validates"
        top1_by_loss.setdefault(result.run.rpartition("-")[0], []).append(result.top1)
    return {
        loss: Accuracy(statistics.mean(top1), statistics.stdev(top1) if len(top1) > 1 else 0.0, len(top1))
        for loss, top1 in top1_by_loss.items()
    }


# -- summary ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy on validation images, over seeds."""

    top1_mean: float
    top1_sd: float
    n: int


@dataclass(frozen=True)
class Storage:
    """Bytes per view of the teacher's logits: in the archive, and in two common formats; and of its features."""

    archived: float
    features: float
    """The three layers, in the archive."""
    float16: float
    top10: float
    """Ten float16 probabilities and ten int16 classes; the other classes are lost."""


@dataclass(frozen=True)
class Speed:
    """Images per second while training one student."""

    cached: float
    online: float

    @property
    def ratio(self) -> float:
        return self.cached / self.online


@dataclass(frozen=True)
class Summary:
    teacher_top1: float
    students: Mapping[str, Accuracy]
    """By loss."""
    misled: Mapping[str, Accuracy]
    """The same with a teacher that is confidently wrong on a fifth of the views."""
    storage: Storage
    speed: Speed
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": {"top1": self.teacher_top1},
            "students": {loss: asdict(accuracy) for loss, accuracy in self.students.items()},
            "students_of_misled_teacher": {loss: asdict(accuracy) for loss, accuracy in self.misled.items()},
            "bytes_per_view": asdict(self.storage),
            "images_per_second": asdict(self.speed) | {"ratio": self.speed.ratio},
            "seconds": self.seconds,
        }
