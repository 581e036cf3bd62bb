"""What a run writes about itself: its configuration, a line for every epoch, the best weights so far, the result."""

from __future__ import annotations

import csv
import io
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from redistill_cache.errors import UsageError
from redistill_cache.storage import LOCAL

from redistill.metrics import Metrics
from redistill.models.weights import save_weights
from redistill.optim import lr_at
from redistill.training.checkpoint import sweep
from redistill.training.feed import TrainBatch
from redistill.training.member import Member
from redistill.training.options import TrainOptions, write_config
from redistill.training.prepare import TrainSetup, count_parameters

__all__ = [
    "BEST",
    "RESULT",
    "STUDENT",
    "Lap",
    "Logs",
    "RunFiles",
    "Throughput",
    "TrainResult",
    "open_logs",
    "write_result",
]


# -- clock ------------------------------------------------------------------------------------------------------------
#
# How fast a run goes, and which share of the time is spent waiting for data.


class Lap(NamedTuple):
    seconds: float
    images_per_second: float
    waiting: float
    """Share of the time in which no batch was there, or its teacher's rows were not."""


class Throughput:
    """Runs while an epoch is trained; validation and checkpoints are not counted."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.begun = self.last = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def got(self) -> None:
        """A batch is there."""
        self.waited += time.perf_counter() - self.last

    def done(self, images: int) -> None:
        """It has been used."""
        self.last = time.perf_counter()
        self.images += images

    def lap(self) -> Lap:
        seconds = max(time.perf_counter() - self.begun, 1e-9)
        return Lap(seconds, self.images / seconds, self.waited / seconds)


def images_of_run(batch: TrainBatch, epochs: int) -> tuple[int, int]:
    """About how many images are done after this batch, and how many there are in all: batches are equal but for one."""
    epoch = batch.global_rows * batch.place.batches
    return batch.place.epoch * epoch + (batch.place.batch + 1) * batch.global_rows, epochs * epoch


# -- outcome ----------------------------------------------------------------------------------------------------------
#
# What a run leaves when it is done: weights, and a result for machines.

RESULT = "result.json"
STUDENT = "student.safetensors"
BEST = "best.safetensors"


@dataclass(frozen=True)
class TrainResult:
    """One trained student. Metrics are None without --val."""

    run: str
    student: str
    loss: str
    seed: int
    archive_id: str | None
    epochs: int
    best_epoch: int | None
    best_top1: float | None
    top1: float | None
    top5: float | None
    nll: float | None
    ece: float | None
    agreement: float | None
    images_per_second: float
    seconds: float
    parameters: int
    evaluation: dict[str, Any] | None
    """Everything about the last epoch: reliability bins, accuracy per class, beside the teacher."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_result(folder: Path, outcome: TrainResult) -> None:
    LOCAL.publish(folder / RESULT, (json.dumps(outcome.to_json(), indent=1) + "\n").encode())


def headline(found: Metrics | None) -> dict[str, float | None]:
    """The fixed keys of `train` and `evaluate`."""
    if found is None:
        return dict.fromkeys(("top1", "top5", "nll", "ece", "agreement"))
    agreement = None if found.teacher is None else found.teacher.agreement
    return {"top1": found.top1, "top5": found.top5, "nll": found.nll, "ece": found.ece, "agreement": agreement}


# -- logs -------------------------------------------------------------------------------------------------------------
#
# Figures of every epoch, for people and their tools: metrics.csv, TensorBoard, Weights & Biases.

Row = Mapping[str, Any]


class Log(Protocol):
    def epoch(self, row: Row, history: Sequence[Row]) -> None: ...
    def close(self) -> None: ...


class CsvLog:
    """metrics.csv, written anew from the whole history every epoch: a resumed run leaves no line twice."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.csv"

    def epoch(self, row: Row, history: Sequence[Row]) -> None:
        del row
        columns = list(dict.fromkeys(name for line in history for name in line))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        LOCAL.publish(self.path, text.getvalue().encode())

    def close(self) -> None: ...


class TensorBoardLog:
    def __init__(self, folder: Path, first_epoch: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "--log tensorboard needs an extra: pip install 'redistill[tensorboard]', or --log csv"
            ) from None
        # What an interrupted run wrote beyond the place it goes on from is dropped by TensorBoard.
        self.writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def epoch(self, row: Row, history: Sequence[Row]) -> None:
        del history
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbLog:
    def __init__(self, folder: Path, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError("--log wandb needs an extra: pip install 'redistill[wandb]'") from None
        kept = folder / "wandb-id.txt"  # a run that goes on is the same run there
        if not kept.exists():
            LOCAL.publish(kept, uuid.uuid4().hex.encode())
        self.run = wandb.init(project="redistill", name=name, dir=str(folder), id=kept.read_text(), resume="allow")

    def epoch(self, row: Row, history: Sequence[Row]) -> None:
        del history
        self.run.log(dict(row), step=row["epoch"])

    def close(self) -> None:
        self.run.finish()


class Logs:
    """Every log of one run."""

    def __init__(self, logs: Sequence[Log]) -> None:
        self.logs = logs

    def epoch(self, row: Row, history: Sequence[Row]) -> None:
        """`row` is the last of `history`."""
        for log in self.logs:
            log.epoch(row, history)

    def close(self) -> None:
        for log in self.logs:
            log.close()


def open_logs(folder: Path, kinds: Sequence[str], *, first_epoch: int = 0) -> Logs:
    """The logs of a run that goes on with `first_epoch`."""
    logs: list[Log] = []
    for kind in kinds:
        if kind == "csv":
            logs.append(CsvLog(folder))
        elif kind == "tensorboard":
            logs.append(TensorBoardLog(folder, first_epoch))
        else:
            logs.append(WandbLog(folder, folder.name))
    return Logs(logs)


# -- records ----------------------------------------------------------------------------------------------------------

LIBRARIES = ("redistill", "torch", "torchvision", "numpy", "zarr")


class RunFiles:
    """The folders of all members. Every process counts; only the first one writes."""

    def __init__(self, options: TrainOptions, run: TrainSetup, *, first_epoch: int, writes: bool) -> None:
        self.options, self.run, self.writes = options, run, writes
        self.logs: list[Logs] = []
        if writes:
            options.out.mkdir(parents=True, exist_ok=True)
            sweep(options.out)
            self.logs = [self._open(member, first_epoch) for member in run.members]

    def _open(self, member: Member, first_epoch: int) -> Logs:
        spec, archive = member.spec, self.run.archive
        folder = self.options.folder(spec)
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        own = {"students": [spec.student], "losses": ["+".join(spec.losses)], "seeds": [spec.seed], "out": str(folder)}
        facts: dict[str, dict[str, Any]] = {
            "archive": {"id": archive.id, "samples": archive.num_samples, "views": archive.num_views},
            "versions": {name: version(name) for name in LIBRARIES},
        }
        write_config(folder, self.options.to_json() | own, facts)
        return open_logs(folder, self.options.log, first_epoch=first_epoch + 1)

    def epoch(self, epoch: int, found: Sequence[Metrics | None], lap: Lap) -> list[dict[str, Any]]:
        """Keep the figures of an epoch, and the weights where they are the best; the rows, by the members' names."""
        rows = []
        for member, metrics in zip(self.run.members, found, strict=True):
            member.history.append(self._row(epoch, member, metrics, lap))
            rows.append({"name": member.spec.name, **member.history[-1]})
            if metrics is not None and metrics.top1 > member.best:
                member.best, member.best_epoch = metrics.top1, epoch + 1
                self._keep(member, BEST)
        for member, logs in zip(self.run.members, self.logs, strict=False):
            logs.epoch(member.history[-1], member.history)
        return rows

    def _row(self, epoch: int, member: Member, metrics: Metrics | None, lap: Lap) -> dict[str, Any]:
        """Under the names of metrics.csv."""
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "view": "+".join(str(view) for view in self.run.feed.views(epoch)),
            "seconds": round(lap.seconds, 3),
            "images_per_second": round(lap.images_per_second, 1),
            "data_wait": round(lap.waiting, 4),
            "lr": lr_at(member.optim, float(epoch)),
            **{f"train_{name}": value for name, value in member.means().items()},
        }
        for name, value in headline(metrics).items():
            row[f"val_{name}"] = "" if value is None else value
        row["val_kl_t1"] = "" if metrics is None or metrics.teacher is None else metrics.teacher.kl_t1
        return row

    def _keep(self, member: Member, name: str) -> None:
        if self.writes:
            save_weights(member.student, self.options.folder(member.spec) / name, member.opened.metadata())

    def finish(self, found: Sequence[Metrics | None]) -> list[TrainResult]:
        """Weights and results of the members, given the metrics of their last epoch."""
        outcomes = []
        for member, metrics in zip(self.run.members, found, strict=True):
            outcomes.append(self._outcome(member, metrics))
            self._keep(member, STUDENT)
            if self.writes:
                write_result(self.options.folder(member.spec), outcomes[-1])
        for logs in self.logs:
            logs.close()
        return outcomes

    def _outcome(self, member: Member, metrics: Metrics | None) -> TrainResult:
        rows = member.history
        seconds = sum(row["seconds"] for row in rows)
        images = sum(row["seconds"] * row["images_per_second"] for row in rows)
        validated = self.run.validation is not None
        return TrainResult(
            run=member.spec.name,
            student=member.spec.student,
            loss="+".join(member.spec.losses),
            seed=member.spec.seed,
            archive_id=self.run.archive.id,
            epochs=len(rows),
            best_epoch=member.best_epoch if validated else None,
            best_top1=member.best if validated else None,
            **headline(metrics),
            images_per_second=images / seconds if seconds else 0.0,
            seconds=seconds,
            parameters=count_parameters(member.module),
            evaluation=None if metrics is None else metrics.to_json(),
        )
