"""Stage 2 from beginning to end: `train(options)`.

archive, data, students held against each other -> state of an earlier run, if any
-> batches: pixels from workers, teacher's rows from the resident view, one step of every member
-> end of an epoch: validation, logs, checkpoint -> weights and results
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from redistill_cache.errors import Refused
from redistill_cache.storage import disk_trouble

from redistill.evaluation import Metrics, Tally
from redistill.interrupts import StopRequest, stop_on_signals
from redistill.losses.objective import Mix
from redistill.losses.schedule import Progress
from redistill.models.weights import save_weights
from redistill.optim import lr_at
from redistill.training.checkpoint import LAST, load_checkpoint, save_checkpoint
from redistill.training.config import write_config
from redistill.training.distributed import World, joined_world
from redistill.training.feed import Batch
from redistill.training.logs import Logs, open_logs
from redistill.training.member import Member
from redistill.training.options import TrainOptions
from redistill.training.outcome import BEST, STUDENT, Outcome, headline, write_result
from redistill.training.prepare import Run, parameters_of, prepare
from redistill.training.watcher import Silent, Watcher

__all__ = ["train"]

AGAIN = "run the same command again to go on from the checkpoint"
# Steps between two looks at things that make a GPU wait, or processes wait for each other.
LOOK = {"cpu": 1, "cuda": 20, "mps": 20}


def train(options: TrainOptions, watcher: Watcher | None = None) -> list[Outcome]:
    """Train every member of the cohort, and return what came of them."""
    with joined_world(options.device) as world, stop_on_signals() as stop:
        if watcher is None or not world.first:
            watcher = Silent()
        if options.resume == "never" and (options.out / LAST).exists():
            raise Refused(f"{options.out} holds a run; choose another --out, or --resume auto to go on with it")
        run = prepare(options, world, watcher)
        place = load_checkpoint(options.out, run.members, options.deciding(), run.archive.id) or (0, 0)
        trainer = Training(options, world, run, watcher, stop)
        with disk_trouble("write", options.out, "; then run the same command again"):
            return trainer.run_from(*place)


class Training:
    """A run under way."""

    def __init__(self, options: TrainOptions, world: World, run: Run, watcher: Watcher, stop: StopRequest) -> None:
        self.options, self.world, self.run, self.watcher, self.stop = options, world, run, watcher, stop
        self.saved = time.monotonic()
        self.clock = Clock()
        self.logs: list[Logs] = []

    def run_from(self, epoch: int, batch: int) -> list[Outcome]:
        """Train from a place to the end."""
        if epoch or batch:
            self.watcher.say(f"goes on at epoch {epoch + 1}, batch {batch + 1}")
        if self.world.first:
            self._start_folders(epoch)
        found: list[Metrics | None] = [None] * len(self.run.members)
        if epoch < self.run.feed.epochs:
            found = self._epochs(epoch, batch)
        elif self.run.validation is not None:
            found = list(self._validate())
        outcomes = [self._finish(member, metrics) for member, metrics in zip(self.run.members, found, strict=True)]
        for logs in self.logs:
            logs.close()
        return outcomes

    def _epochs(self, epoch: int, batch: int) -> list[Metrics | None]:
        found: list[Metrics | None] = []
        with self.run.targets or Nothing():
            self._begin(epoch)
            self.clock.start()
            for item in self.run.feed.start(epoch, batch):
                self.clock.got()
                self._step(item)
                self.clock.done(item.global_rows)
                if item.place.batch + 1 == item.place.batches:
                    found = self._end_of_epoch(item.place.epoch)
                else:
                    self._pause_if_asked(item)
        return found

    # -- a step -------------------------------------------------------------------------------------------------------

    def _begin(self, epoch: int) -> None:
        """The teacher's rows of this epoch, and in the background those of the next."""
        if self.run.targets is not None and epoch < self.run.feed.epochs:
            follows = epoch + 1 < self.run.feed.epochs
            self.run.targets.begin(self.run.feed.views(epoch), self.run.feed.views(epoch + 1) if follows else None)

    def _step(self, item: Batch) -> None:
        device, carried, place = self.world.device, item.carried, item.place
        pixels = carried.pixels.to(device, non_blocking=True)
        labels = carried.labels.to(device, non_blocking=True)
        mix = None
        if carried.partner_labels is not None and carried.weights is not None:
            mix = Mix(carried.partner_labels.to(device), carried.weights.to(device))
        teacher = None if self.run.targets is None else self.run.targets(item, pixels)
        progress = Progress(place.epoch + place.batch / place.batches, self.run.feed.epochs)
        share = len(pixels) * self.world.size / item.global_rows
        look = place.batch % LOOK[device.type] == 0 or place.batch + 1 == place.batches
        for member in self.run.members:
            member.step(pixels, teacher, labels, mix, progress, share)
            if look:
                member.refuse_diverged(place.epoch, place.batch)
        if look and self.world.first:
            per_epoch = self.clock.images_of_epoch(place, item.global_rows)
            first = self.run.members[0].means()
            figures = {"epoch": place.epoch + 1, **{name: f"{value:.3f}" for name, value in first.items()}}
            figures["wait"] = f"{self.clock.waiting:.0%}"
            self.watcher.step(
                round((place.epoch + (place.batch + 1) / place.batches) * per_epoch),
                round(per_epoch * self.run.feed.epochs),
                figures,
            )

    def _pause_if_asked(self, item: Batch) -> None:
        """Between batches: save now and then, and when asked to stop."""
        place = item.place
        if self.world.size > 1 and place.batch % 10:
            return  # processes agree every ten batches
        due = time.monotonic() - self.saved > 60 * self.options.checkpoint_minutes
        stop = self.world.any(bool(self.stop))
        if stop or self.world.any(due):
            self._save(place.epoch, place.batch + 1)
        if stop:
            self.stop.number = self.stop.number or 15
            self.stop.raise_if_set(AGAIN)

    def _save(self, epoch: int, batch: int) -> None:
        for member in self.run.members:
            member.refuse_diverged(epoch, batch)
        if self.world.first:
            save_checkpoint(
                self.options.out, self.run.members, self.options.deciding(), self.run.archive.id, epoch, batch
            )
        self.world.wait()
        self.saved = time.monotonic()

    # -- the end of an epoch ------------------------------------------------------------------------------------------

    def _end_of_epoch(self, epoch: int) -> list[Metrics | None]:
        seconds, pace, waiting = self.clock.lap()
        found: list[Metrics | None] = list(self._validate()) if self.run.validation is not None else []
        found = found or [None] * len(self.run.members)
        rows = []
        for member, metrics in zip(self.run.members, found, strict=True):
            row = self._row(epoch, member, metrics, seconds, pace, waiting)
            member.history.append(row)
            member.forget()
            rows.append({"name": member.spec.name, **row})
            if self.world.first:
                self._keep_best(member, metrics, epoch)
        for member, logs in zip(self.run.members, self.logs, strict=False):
            logs.epoch(member.history[-1], member.history)
        self.watcher.epoch(rows)
        self._save(epoch + 1, 0)
        if self.world.any(bool(self.stop)) and epoch + 1 < self.run.feed.epochs:
            self.stop.number = self.stop.number or 15
            self.stop.raise_if_set(AGAIN)
        self._begin(epoch + 1)
        self.clock.start()
        return found

    def _validate(self) -> list[Metrics]:
        """Every member over the validation images, each process its share of them."""
        assert self.run.validation is not None
        students = [(member.student, member.normalise) for member in self.run.members]
        mine = self.run.validation.tallies(students, self.world.device, self.run.members[0].amp)
        found = []
        for tallies in zip(*self.world.gather(mine), strict=True):
            total: Tally = tallies[0]
            for other in tallies[1:]:
                total = total + other
            found.append(total.metrics())
        return found

    def _row(
        self, epoch: int, member: Member, metrics: Metrics | None, seconds: float, pace: float, waiting: float
    ) -> dict[str, Any]:
        """The figures of one member and one epoch, under the names of metrics.csv."""
        means = member.means()
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "view": "+".join(str(view) for view in self.run.feed.views(epoch)),
            "seconds": round(seconds, 3),
            "images_per_second": round(pace, 1),
            "data_wait": round(waiting, 4),
            "lr": lr_at(member.optim, float(epoch)),
            **{f"train_{name}": value for name, value in means.items()},
        }
        for name, value in headline(metrics).items():
            row[f"val_{name}"] = "" if value is None else value
        row["val_kl_t1"] = "" if metrics is None or metrics.teacher is None else metrics.teacher.kl_t1
        return row

    def _keep_best(self, member: Member, metrics: Metrics | None, epoch: int) -> None:
        if metrics is not None and metrics.top1 > member.best:
            member.best, member.best_epoch = metrics.top1, epoch + 1
            folder = self.options.folder(member.spec)
            save_weights(member.student, folder / BEST, member.opened.metadata())

    # -- the ends of a run --------------------------------------------------------------------------------------------

    def _start_folders(self, epoch: int) -> None:
        spec = self.run.archive.spec
        facts: dict[str, dict[str, Any]] = {
            "archive": {"id": self.run.archive.id, "samples": spec.num_samples, "views": self.run.archive.num_views},
            "versions": {name: version(name) for name in ("redistill", "torch", "torchvision", "numpy", "zarr")},
        }
        for member in self.run.members:
            folder = self.options.folder(member.spec)
            folder.mkdir(parents=True, exist_ok=True)
            own = {"students": [member.spec.student], "seeds": [member.spec.seed], "out": str(folder)}
            own["losses"] = ["+".join(member.spec.losses)]
            write_config(folder, self.options.to_json() | own, facts)
            self.logs.append(open_logs(folder, self.options.log, first_epoch=epoch + 1))

    def _finish(self, member: Member, metrics: Metrics | None) -> Outcome:
        rows = member.history
        seconds = sum(row["seconds"] for row in rows)
        images = sum(row["seconds"] * row["images_per_second"] for row in rows)
        validated = self.run.validation is not None
        outcome = Outcome(
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
        if self.world.first:
            folder = self.options.folder(member.spec)
            save_weights(member.student, folder / STUDENT, member.opened.metadata())
            write_result(folder, outcome)
        return outcome


class Clock:
    """How fast it goes, and which share of the time is spent waiting for data. Validation is not counted."""

    def __init__(self) -> None:
        self.start()
        self.per_epoch = 0.0

    def start(self) -> None:
        self.begun = self.last = time.perf_counter()
        self.waited = 0.0
        self.images = 0

    def got(self) -> None:
        now = time.perf_counter()
        self.waited += now - self.last

    def done(self, images: int) -> None:
        self.last = time.perf_counter()
        self.images += images

    @property
    def waiting(self) -> float:
        return self.waited / max(time.perf_counter() - self.begun, 1e-9)

    def images_of_epoch(self, place: Any, rows: int) -> float:  # noqa: ANN401  a Place
        """About how many images an epoch has: batches are equal but for one row."""
        self.per_epoch = self.per_epoch or float(rows * place.batches)
        return self.per_epoch

    def lap(self) -> tuple[float, float, float]:
        """Seconds, images per second and share of waiting since the start."""
        seconds = time.perf_counter() - self.begun
        return seconds, self.images / seconds, self.waited / seconds


class Nothing:
    """In place of targets where no loss asks for a teacher."""

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *_: object) -> None: ...
