"""Run the demo: every step is the one a user would take, and what is done already is not done again."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from redistill_cache import open_archive
from redistill_cache.errors import Refused
from redistill_cache.files import LOCAL
from redistill_cache.inspect import describe
from redistill_cache.storage import disk_trouble

from redistill.caching import CacheOptions, cache_teacher
from redistill.caching.watcher import Watcher as CacheWatcher
from redistill.demo.setting import STUDENT_DATA, STUDENT_NETWORK, TEACHER_NETWORK, TEACHER_WEIGHTS, VAL_DATA
from redistill.demo.summary import LOSSES, Speed, Storage, Summary, accuracies
from redistill.devices import one_thread
from redistill.evaluate import evaluate
from redistill.optim import OptimConfig
from redistill.report import write_report
from redistill.rewriting import mislead, rewrite_logits
from redistill.training import Outcome, TrainOptions, train
from redistill.training.watcher import Watcher as TrainWatcher

__all__ = ["run_demo"]

VIEWS = 8
RECIPE = "cifar?hflip=0&padding=3&padding_mode=reflect"
SEEDS = (0, 1, 2)
BATCH_SIZE = 32
OPTIM = OptimConfig(opt="nesterov", lr=0.1, weight_decay=5e-4, epochs=48, warmup_epochs=1.0)
MISLED_SHARE = 0.2
ARCHIVE, VAL_ARCHIVE, MISLED = "teacher.redistill.zarr", "val.redistill.zarr", "misled.redistill.zarr"


class DemoWatcher(Protocol):
    """Told of every step, and asked for somebody to watch its parts."""

    def step(self, text: str) -> None: ...
    def caching(self) -> CacheWatcher: ...
    def training(self) -> TrainWatcher: ...


def run_demo(out: Path, watcher: DemoWatcher) -> Summary:
    """Everything into `out`; a second call takes up what is there."""
    start = time.monotonic()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "teacher.safetensors").exists())):
        raise Refused(f"{out} is there and is no demo; choose another --out")
    teacher = out / "teacher.safetensors"
    with disk_trouble("write", out):
        out.mkdir(parents=True, exist_ok=True)
        if not teacher.exists():
            LOCAL.publish(teacher, TEACHER_WEIGHTS.read_bytes())
    watcher.step(f"stage 1: the teacher answers once for {VIEWS} views of the students' images")
    cached(out, ARCHIVE, STUDENT_DATA, RECIPE, VIEWS, watcher)
    cached(out, VAL_ARCHIVE, VAL_DATA, "center", 1, watcher)
    mislead_archive(out)
    watcher.step(
        "stage 2: nine students from the archive in one pass over the images; beside them, six whose teacher is "
        "confidently wrong about a fifth of what it is asked"
    )
    with one_thread():  # two trainings of tiny networks share the cores better than the threads of one
        clean, astray = train_both(run_options(out, ARCHIVE, "runs", LOSSES), misled_options(out), watcher)
        watcher.step("the speed of training with the archive, and with the teacher beside the student")
        paces = speed(out, watcher)
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


def cached(out: Path, name: str, data: str, recipe: str, views: int, watcher: DemoWatcher) -> None:
    options = CacheOptions(
        data=data,
        teacher=f"{TEACHER_NETWORK}&weights={out / 'teacher.safetensors'}",
        views=views,
        out=out / name,
        recipe=recipe,
        device="cpu",
        licence="CC0-1.0",
    )
    cache_teacher(options, watcher.caching())


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


def train_both(here: TrainOptions, beside: TrainOptions, watcher: DemoWatcher) -> tuple[list[Outcome], list[Outcome]]:
    """Two cohorts at once, the second in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (1,)) as pool:
        other = pool.submit(train, beside)
        return train(here, watcher.training()), other.result()


def storage(path: Path) -> Storage:
    archive = open_archive(path)
    (signals,) = describe(archive)["teachers"].values()
    kept = min(10, archive.num_classes)
    return Storage(signals["logits"]["bytes_per_view"], 2.0 * archive.num_classes, 4.0 * kept)


def speed(out: Path, watcher: DemoWatcher) -> Speed:
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
        train(options, watcher.training())
        rows = (options.out / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("images_per_second")
        return max(float(row.split(",")[column]) for row in rows[2:])  # the first epoch waits for workers to start

    online = f"{TEACHER_NETWORK}&weights={out / 'teacher.safetensors'}"
    return Speed(cached=pace("cached", None), online=pace("online", online))
