"""The files of a run. Every member of a cohort has a folder with

    config.toml                          the options of the run, the archive and the versions of libraries
    metrics.csv, events.out.tfevents.*   one row per epoch; TensorBoard and Weights & Biases on request
    best.safetensors                     the weights of the best epoch by validation accuracy
    student.safetensors, result.json     the final weights and metrics, written when the run is finished

The checkpoint of the whole cohort lies beside these folders (checkpoint.py).
"""

from __future__ import annotations

import csv
import io
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from redistill_cache.errors import Refused, UsageError
from redistill_cache.storage import LOCAL, disk_trouble, is_leftover, read_small

from redistill.metrics import Metrics
from redistill.models.weights import save_weights
from redistill.optim import lr_at
from redistill.training.checkpoint import has_checkpoint, remove_partial_files
from redistill.training.member import Member
from redistill.training.options import CONFIG, TrainOptions, read_config, write_config
from redistill.training.prepare import TrainSetup
from redistill.training.throughput import EpochTimes

__all__ = ["BEST", "RESULT", "STUDENT", "RunFiles", "TrainResult", "headline", "refuse_foreign_folder"]

RESULT = "result.json"
STUDENT = "student.safetensors"
BEST = "best.safetensors"

LIBRARIES = ("redistill", "torch", "torchvision", "numpy", "zarr")


def refuse_foreign_folder(options: TrainOptions) -> None:
    """Refuse to replace files of others: `out` must be new, a run, or what a killed start leaves."""
    out = options.out
    if not out.is_dir():
        return
    with disk_trouble("read", out):
        children = sorted(out.iterdir())
        folders = [out, *(path for path in children if path.is_dir())]
        if has_checkpoint(out) or any(map(is_run, folders)):
            return
        for folder in folders:
            for path in sorted(folder.iterdir()):
                if not is_leftover(path) and (folder != out or not path.is_dir()):
                    raise Refused(f"--out {out} is not a run and holds {path.relative_to(out)}; choose a new folder")


def is_run(folder: Path) -> bool:
    """Whether `train` has written the config.toml in this folder."""
    try:
        return {"students", "archive"} <= read_config(folder / CONFIG).keys()
    except UsageError:
        return False


@dataclass(frozen=True)
class TrainResult:
    """One trained student. Metrics are None without --val."""

    run: str
    student: str
    loss: str
    seed: int
    archive_id: str | None
    alignment: str
    """The verdict on the views: "exact", "tolerance", or "no canaries" if the archive has none to compare with."""
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
    """All metrics of the last epoch: reliability bins, accuracy per class, comparison with the teacher."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class RunFiles:
    """The folders of all members. Every rank calls the same methods; only the first one writes."""

    def __init__(self, options: TrainOptions, setup: TrainSetup, *, first_epoch: int, writes: bool) -> None:
        self.options, self.setup, self.writes = options, setup, writes
        self.logs: list[list[Log]] = []
        if writes:
            options.out.mkdir(parents=True, exist_ok=True)
            remove_partial_files(options.out)
            self.logs = [self._open_folder(member, first_epoch) for member in setup.members]

    def _open_folder(self, member: Member, first_epoch: int) -> list[Log]:
        spec, archive = member.spec, self.setup.archive
        folder = self.options.folder(spec)
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial_files(folder)
        own = {"students": [spec.student], "losses": ["+".join(spec.losses)], "seeds": [spec.seed], "out": str(folder)}
        facts: dict[str, dict[str, Any]] = {
            "archive": {
                "id": archive.id,
                "samples": archive.num_samples,
                "views": self.setup.use.views,
                "teachers": list(self.setup.use.teachers),
            },
            "versions": {name: version(name) for name in LIBRARIES},
        }
        if self.setup.validation is not None:
            facts["validation"] = {"images": int((self.setup.validation.labels >= 0).sum())}
        write_config(folder, self.options.to_json() | own, facts)
        return [open_log(kind, folder, first_epoch=first_epoch + 1) for kind in self.options.log]

    def end_epoch(self, epoch: int, metrics: Sequence[Metrics | None], times: EpochTimes) -> list[dict[str, Any]]:
        """Log an epoch and save the best weights; returns the logged rows with the members' names."""
        rows = []
        for member, of_member in zip(self.setup.members, metrics, strict=True):
            member.history.append(self._row(epoch, member, of_member, times))
            rows.append({"name": member.spec.name, **member.history[-1]})
            if of_member is not None and of_member.top1 > member.best:
                member.best, member.best_epoch = of_member.top1, epoch + 1
                self._save_weights(member, BEST, of_member)
        for member, logs in zip(self.setup.members, self.logs, strict=False):
            for log in logs:
                log.epoch(member.history)
        return rows

    def _row(self, epoch: int, member: Member, metrics: Metrics | None, times: EpochTimes) -> dict[str, Any]:
        """The columns of metrics.csv."""
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "view": "+".join(str(view) for view in self.setup.feed.views(epoch)),
            "seconds": round(times.seconds, 3),
            "images_per_second": round(times.images_per_second, 1),
            "data_wait": round(times.waiting, 4),
            "lr": lr_at(member.optim, float(epoch)),
            **{f"train_{name}": value for name, value in member.loss_means().items()},
        }
        for name, value in headline(metrics).items():
            row[f"val_{name}"] = "" if value is None else value
        row["val_kl_t1"] = "" if metrics is None or metrics.teacher is None else metrics.teacher.kl_t1
        return row

    def _save_weights(self, member: Member, name: str, metrics: Metrics | None) -> None:
        if self.writes:
            model = replace(member.opened, top1=None if metrics is None else metrics.top1)
            save_weights(member.student, self.options.folder(member.spec) / name, model.metadata())

    def finish(self, metrics: Sequence[Metrics | None]) -> list[TrainResult]:
        """Write weights and results, from the metrics of the last epoch."""
        results = []
        for member, of_member in zip(self.setup.members, metrics, strict=True):
            result = self._result(member, of_member)
            results.append(result)
            self._save_weights(member, STUDENT, of_member)
            if self.writes:
                text = json.dumps(result.to_json(), indent=1) + "\n"
                LOCAL.publish(self.options.folder(member.spec) / RESULT, text.encode())
        for logs in self.logs:
            for log in logs:
                log.close()
        return results

    def _result(self, member: Member, metrics: Metrics | None) -> TrainResult:
        rows = member.history
        seconds = sum(row["seconds"] for row in rows)
        images = sum(row["seconds"] * row["images_per_second"] for row in rows)
        validated = self.setup.validation is not None
        return TrainResult(
            run=member.spec.name,
            student=member.spec.student,
            loss="+".join(member.spec.losses),
            seed=member.spec.seed,
            archive_id=self.setup.archive.id,
            alignment=self.setup.alignment.verdict,
            epochs=len(rows),
            best_epoch=member.best_epoch if validated else None,
            best_top1=member.best if validated else None,
            **headline(metrics),
            images_per_second=images / seconds if seconds else 0.0,
            seconds=seconds,
            parameters=member.num_parameters,
            evaluation=None if metrics is None else metrics.to_json(),
        )


def headline(metrics: Metrics | None) -> dict[str, float | None]:
    """The metrics that `train` and `evaluate` report under fixed keys."""
    if metrics is None:
        return dict.fromkeys(("top1", "top5", "nll", "ece", "agreement"))
    agreement = None if metrics.teacher is None else metrics.teacher.agreement
    return {
        "top1": metrics.top1,
        "top5": metrics.top5,
        "nll": metrics.nll,
        "ece": metrics.ece,
        "agreement": agreement,
    }


# -- logs of epochs ---------------------------------------------------------------------------------------------------

History = Sequence[Mapping[str, Any]]


class Log(Protocol):
    def epoch(self, history: History) -> None:
        """Log the last row of `history`, which has the rows of all epochs so far."""

    def close(self) -> None: ...


def open_log(kind: str, folder: Path, *, first_epoch: int) -> Log:
    """The log of a run that starts, or is resumed, with `first_epoch`."""
    if kind == "csv":
        return CsvLog(folder)
    if kind == "tensorboard":
        return TensorBoardLog(folder, first_epoch)
    return WandbLog(folder)


class CsvLog:
    """metrics.csv, rewritten from the whole history every epoch, so that a resumed run has no duplicate rows."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.csv"

    def epoch(self, history: History) -> None:
        columns = list(dict.fromkeys(name for row in history for name in row))
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
        except ImportError as error:
            raise UsageError(
                f"--log tensorboard cannot import tensorboard ({error}); pip install tensorboard, or use --log csv"
            ) from None
        # TensorBoard drops what an interrupted run logged after the checkpoint.
        self.writer = SummaryWriter(str(folder), purge_step=first_epoch)

    def epoch(self, history: History) -> None:
        row = history[-1]
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbLog:
    MAX_ID = 64

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError("--log wandb needs an extra: pip install 'redistill[wandb]'") from None
        id_file = folder / "wandb-id.txt"  # a resumed run is the same run on the server
        if not id_file.exists():
            LOCAL.publish(id_file, uuid.uuid4().hex.encode())
        run_id = read_small(id_file, self.MAX_ID).decode(errors="replace")
        self.run = wandb.init(project="redistill", name=folder.name, dir=str(folder), id=run_id, resume="allow")

    def epoch(self, history: History) -> None:
        self.run.log(dict(history[-1]), step=history[-1]["epoch"])

    def close(self) -> None:
        self.run.finish()
