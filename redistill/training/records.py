"""What a run writes about itself: its configuration, a line for every epoch, the best weights so far, the result."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from redistill.evaluation import Metrics
from redistill.models.weights import save_weights
from redistill.optim import lr_at
from redistill.training.checkpoint import sweep
from redistill.training.clock import Lap
from redistill.training.config import write_config
from redistill.training.logs import Logs, open_logs
from redistill.training.member import Member
from redistill.training.options import TrainOptions
from redistill.training.outcome import BEST, STUDENT, Outcome, headline, write_result
from redistill.training.prepare import Run, parameters_of

__all__ = ["Records"]

LIBRARIES = ("redistill", "torch", "torchvision", "numpy", "zarr")


class Records:
    """The folders of all members. Every process counts; only the first one writes."""

    def __init__(self, options: TrainOptions, run: Run, *, first_epoch: int, writes: bool) -> None:
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

    def finish(self, found: Sequence[Metrics | None]) -> list[Outcome]:
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

    def _outcome(self, member: Member, metrics: Metrics | None) -> Outcome:
        rows = member.history
        seconds = sum(row["seconds"] for row in rows)
        images = sum(row["seconds"] * row["images_per_second"] for row in rows)
        validated = self.run.validation is not None
        return Outcome(
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
            parameters=parameters_of(member.module),
            evaluation=None if metrics is None else metrics.to_json(),
        )
