"""Stage 2 from beginning to end: `train(options)`.

archive, data and students, held against each other -> the state of an earlier run, if there is one
-> batches: pixels from workers, the teacher's rows from the resident view, one step of every member
-> the end of an epoch: validation, logs, checkpoint -> weights and results
"""

from __future__ import annotations

import time
from contextlib import nullcontext

from redistill_cache.errors import RedistillError, Refused
from redistill_cache.storage import disk_trouble

from redistill.interrupts import StopRequest, stop_on_signals
from redistill.losses.objective import Mix
from redistill.losses.schedule import TrainingProgress
from redistill.metrics import Metrics, MetricSums
from redistill.progress import NoProgress, Progress
from redistill.ranks import World, joined_world
from redistill.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from redistill.training.feed import TrainBatch
from redistill.training.options import TrainOptions
from redistill.training.prepare import TrainSetup, prepare
from redistill.training.run_files import RunFiles, Throughput, TrainResult, images_of_run

__all__ = ["Diverged", "train"]

AGAIN = "run the same command again to go on from the checkpoint"
# Batches between two looks at what makes a GPU wait, or processes wait for each other.
LOOK_ALONE = {"cpu": 1, "cuda": 10, "mps": 10}
LOOK_TOGETHER = 10


class Diverged(RedistillError):
    """A loss that is not a number."""

    exit_code = 1


def train(options: TrainOptions, progress: Progress | None = None) -> list[TrainResult]:
    """Train every member of the cohort, and return what came of them."""
    with joined_world(options.device) as world, stop_on_signals(AGAIN) as stop:
        if progress is None or not world.first:
            progress = NoProgress()
        if options.resume == "never" and has_checkpoint(options.out):
            raise Refused(f"{options.out} holds a run; choose another --out, or --resume auto to go on with it")
        run = prepare(options, world, progress)
        with disk_trouble("write", options.out, "; then run the same command again"):
            start = load_checkpoint(options.out, run.members, options.deciding(), run.archive.id, progress)
            if start[0] == run.feed.epochs:
                progress.info(f"{options.out} is finished already; this is what came of it")
            elif start != (0, 0):
                progress.info(f"goes on at epoch {start[0] + 1}, batch {start[1] + 1}")
            records = RunFiles(options, run, first_epoch=start[0], writes=world.first)
            return records.finish(Training(options, world, run, records, progress, stop).from_place(*start))


class Training:
    """A run under way."""

    def __init__(
        self,
        options: TrainOptions,
        world: World,
        run: TrainSetup,
        records: RunFiles,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        self.options, self.world, self.run, self.records = options, world, run, records
        self.progress, self.stop = progress, stop
        self.clock = Throughput()
        self.saved = time.monotonic()
        self.look = LOOK_ALONE[world.device.type] if world.size == 1 else LOOK_TOGETHER

    def from_place(self, epoch: int, batch: int) -> list[Metrics | None]:
        """Train to the end; the metrics of every member after the last epoch."""
        if epoch == self.run.feed.epochs:
            return self._validate()
        found: list[Metrics | None] = []
        resident = None
        with self.run.targets or nullcontext():
            for item in self.run.feed.start(epoch, batch):
                if item.place.epoch != resident:
                    resident = item.place.epoch
                    self._begin_epoch(resident)
                self.clock.got()
                self._step(item)
                self.clock.done(item.global_rows)
                last = item.place.batch + 1 == item.place.batches
                if last or item.place.batch % self.look == 0:
                    self._look(item)
                if last:
                    found = self._end_epoch(item.place.epoch)
        return found

    def _begin_epoch(self, epoch: int) -> None:
        """The teacher's rows of this epoch, and in the background those of the next."""
        if self.run.targets is not None:
            follows = epoch + 1 < self.run.feed.epochs
            self.run.targets.begin(self.run.feed.views(epoch), self.run.feed.views(epoch + 1) if follows else None)

    def _step(self, item: TrainBatch) -> None:
        """One batch to the device, and one step of every member on it."""
        device, carried, place = self.world.device, item.carried, item.place
        pixels = carried.pixels.to(device, non_blocking=True)
        labels = carried.labels.to(device, non_blocking=True)
        mix = None
        if carried.partner_labels is not None and carried.weights is not None:
            mix = Mix(carried.partner_labels.to(device), carried.weights.to(device))
        teacher = None if self.run.targets is None else self.run.targets(item, pixels)
        progress = TrainingProgress(place.epoch + place.batch / place.batches, self.run.feed.epochs)
        share = len(pixels) * self.world.size / item.global_rows
        for member in self.run.members:
            member.step(pixels, teacher, labels, mix, progress, share)

    def _look(self, item: TrainBatch) -> None:
        """Between batches, all processes at the same ones: is it going well, is it time to save, are we to stop?"""
        self._show(item)
        due = time.monotonic() - self.saved > 60 * self.options.checkpoint_minutes
        diverged = [member.diverged for member in self.run.members]
        stop, due, *diverged = self.world.any(bool(self.stop), due, *diverged)
        where = f"epoch {item.place.epoch + 1}, batch {item.place.batch + 1}"
        self._refuse_where(diverged, "loss is", where)
        if item.place.batch + 1 == item.place.batches:
            return  # the end of the epoch saves anyway
        if stop or due:
            self._refuse_ruined(where)
            self._save(item.place.epoch, item.place.batch + 1)
        if stop:
            self._leave()

    def _show(self, item: TrainBatch) -> None:
        done, total = images_of_run(item, self.run.feed.epochs)
        means = {name: f"{value:.3f}" for name, value in self.run.members[0].means().items()}
        waiting = f"{self.clock.lap().waiting:.0%}"
        self.progress.advance("train", done, total, epoch=item.place.epoch + 1, **means, wait=waiting)

    # -- the end of an epoch ------------------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> list[Metrics | None]:
        lap = self.clock.lap()
        self._refuse_ruined(f"the end of epoch {epoch + 1}")
        self._pool_counts()
        found = self._validate()
        rows = self.records.epoch(epoch, found, lap)
        for member in self.run.members:
            member.forget()
        self.progress.epoch(rows)
        self._save(epoch + 1, 0)
        (stop,) = self.world.any(bool(self.stop))
        if stop and epoch + 1 < self.run.feed.epochs:
            self._leave()
        self.clock.start()
        return found

    def _validate(self) -> list[Metrics | None]:
        """Every member over the validation images, each process its share of them."""
        validation = self.run.validation
        if validation is None:
            return [None] * len(self.run.members)
        for member in self.run.members:  # running statistics of batch norms are each process's own
            self.world.as_first_has(member.student.buffers())
        students = [(member.student, member.normalise) for member in self.run.members]
        mine = validation.tallies(students, self.world.device, self.run.members[0].amp)
        found: list[Metrics | None] = []
        for tallies in zip(*self.world.gather(mine), strict=True):
            total: MetricSums = tallies[0]
            for other in tallies[1:]:
                total = total + other
            found.append(total.metrics())
        return found

    # -- saving and stopping ------------------------------------------------------------------------------------------

    def _save(self, epoch: int, batch: int) -> None:
        """The state after `batch` batches of `epoch`."""
        self._pool_counts()
        if self.world.first:
            members, deciding = self.run.members, self.options.deciding()
            save_checkpoint(self.options.out, members, deciding, self.run.archive.id, (epoch, batch))
        self.world.wait()
        self.saved = time.monotonic()

    def _pool_counts(self) -> None:
        """Move to the first process what all have counted of the losses."""
        if self.world.size == 1:
            return
        everybody = self.world.gather([member.counted() for member in self.run.members])
        for at, member in enumerate(self.run.members):
            member.forget()
            for counted in everybody if self.world.first else ():
                member.add_counted(*counted[at])

    def _refuse_ruined(self, where: str) -> None:
        """The last step may have ruined weights, which the next loss would tell: those are not worth keeping."""
        self._refuse_where(self.world.any(*(not member.finite for member in self.run.members)), "weights are", where)

    def _refuse_where(self, diverged: list[bool], what: str, where: str) -> None:
        for member, is_so in zip(self.run.members, diverged, strict=True):
            if is_so:
                out = self.options.out
                kept = f"{out} keeps the checkpoint before it" if has_checkpoint(out) else "no checkpoint was made yet"
                raise Diverged(
                    f"{member.spec.name}: the {what} no longer finite at {where}; {kept}. Try a lower --lr, "
                    "--clip-grad or more --warmup-epochs, with another --out"
                )

    def _leave(self) -> None:
        """All processes, though the signal may have reached one of them."""
        self.stop.number = self.stop.number or 15
        self.stop.raise_if_set(AGAIN)
