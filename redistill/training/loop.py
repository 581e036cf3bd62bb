"""Stage 2 from beginning to end: `train(options)`.

open and check everything -> load the checkpoint of an earlier run, if any
-> per batch: pixels from the workers, teacher rows from the resident views, one step of every member
-> per epoch: validation, logs, checkpoint -> weights and results
"""

from __future__ import annotations

import time

from redistill_cache import Archive
from redistill_cache.errors import RedistillError, Refused
from redistill_cache.storage import disk_trouble
from redistill_cache.wording import human_bytes

from redistill.cached_teacher import SHARE_OF_GPU
from redistill.devices import fastest_convolutions
from redistill.interrupts import StopRequest, raise_on_signals, stop_on_signals
from redistill.losses.curriculum import TrainingProgress
from redistill.losses.objective import Mix
from redistill.metrics import Metrics
from redistill.progress import NoProgress, Progress
from redistill.ranks import World, joined_world
from redistill.training.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint, saved_use
from redistill.training.feed import BatchPlan, TrainBatch
from redistill.training.options import TrainOptions
from redistill.training.prepare import TrainSetup, prepare
from redistill.training.run_files import RunFiles, TrainResult, refuse_foreign_folder
from redistill.training.settings import settings_in_effect
from redistill.training.targets import CachedTargets
from redistill.training.throughput import Throughput, clock_of

__all__ = ["Diverged", "train"]

RESUME = "run the same command again to resume from the checkpoint"
# Batches between two checks, each of which waits for the GPU or for the other ranks.
CHECK_ALONE = {"cpu": 1, "cuda": 10, "mps": 10}
CHECK_RANKS = 10


class Diverged(RedistillError):
    """A loss or a weight is not finite."""

    exit_code = 1


def train(
    options: TrainOptions, progress: Progress | None = None, *, archive: Archive | None = None
) -> list[TrainResult]:
    """Train every member of the cohort and return their results. Resumes the run in `options.out`, if any.

    `archive` is that of `options.archive` where it is open already: one from `stream_archive` is trained on when its
    first view is here.
    """
    with joined_world(options.device) as world, fastest_convolutions(world.device), stop_on_signals(RESUME) as stop:
        if progress is None or not world.first:
            progress = NoProgress()
        refuse_earlier_run(options)
        refuse_foreign_folder(options)
        with raise_on_signals(RESUME):
            saved, epoch = saved_use(options.out, progress)
            setup = prepare(options, world, progress, saved, epoch=epoch, archive=archive)
        progress.settings(settings_in_effect(options, setup, world))
        with disk_trouble("write", options.out, "; then run the same command again"):
            epoch, batch = load_checkpoint(options.out, setup.members, setup.fixed, setup.use, progress)
            if epoch == setup.feed.epochs:
                progress.info(f"{options.out} is already finished; showing saved results")
            elif (epoch, batch) != (0, 0):
                progress.info(f"resuming at epoch {epoch + 1}, batch {batch + 1}")
            else:
                setup.fit()
            files = RunFiles(options, setup, first_epoch=epoch, writes=world.first)
            return files.finish(Training(options, world, setup, files, progress, stop).run(epoch, batch))


def refuse_earlier_run(options: TrainOptions) -> None:
    if options.resume == "never" and has_checkpoint(options.out):
        raise Refused(f"{options.out} holds a run; choose another --out, or --resume auto to resume it")


class Training:
    """The steps and epochs of a run that is set up."""

    def __init__(
        self,
        options: TrainOptions,
        world: World,
        setup: TrainSetup,
        files: RunFiles,
        progress: Progress,
        stop: StopRequest,
    ) -> None:
        self.options, self.world, self.files, self.progress, self.stop = options, world, files, progress, stop
        self.feed, self.members, self.targets = setup.feed, setup.members, setup.targets
        self.stream = setup.feed.stream
        (self.streamed,) = world.any(self.stream is not None)  # on another machine, the archive may be here as a whole
        self.validation, self.use, self.fixed = setup.validation, setup.use, setup.fixed
        self.labels, self.judged = setup.archive.labels, False
        self.rows_on_gpu: bool | None = None
        self.throughput = Throughput(clock_of(world.device))
        self.last_save = time.monotonic()
        self.check_every = CHECK_ALONE[world.device.type] if world.size == 1 else CHECK_RANKS

    def run(self, epoch: int, batch: int) -> list[Metrics | None]:
        """Train from this batch to the end; the metrics of every member after the last epoch."""
        metrics: list[Metrics | None] = []
        current_epoch = None
        try:
            if epoch == self.feed.epochs:
                return self._validate()
            for item in self.feed.start(epoch, batch):
                plan = item.plan
                if plan.epoch != current_epoch:
                    current_epoch = plan.epoch
                    self._begin_epoch(current_epoch)
                    if self.stream is not None and current_epoch + 1 < self.feed.epochs:
                        self.stream.expect(self.feed.views(current_epoch + 1))
                self.throughput.batch_ready()
                self._step(item)
                self.throughput.batch_done(plan.global_size)
                if plan.last or plan.batch % self.check_every == 0:
                    self._between_batches(plan)
                if plan.last:
                    metrics = self._end_epoch(plan.epoch)
        finally:
            self._close()
        return metrics

    def first_step(self) -> None:
        """The first step of the run, and no more."""
        batches = self.feed.start()
        try:
            item = next(batches)
            self._begin_epoch(0)
            self._step(item)
            diverged = self.world.any(*(member.loss_diverged for member in self.members))
            self._refuse_diverged(diverged, "loss is", "epoch 1, batch 1")
            self._refuse_infinite_weights("epoch 1, batch 1")
        finally:
            batches.close()
            self._close()

    def _close(self) -> None:
        """Stop background work: views being fetched or loaded, and the workers of validation."""
        if self.stream is not None:
            self.stream.close()
        if self.targets is not None:
            self.targets.close()
        if self.validation is not None:
            self.validation.close()

    def _begin_epoch(self, epoch: int) -> None:
        more = epoch + 1 < self.feed.epochs
        if self.stream is not None:
            self.stream.compare(self.feed.views(epoch))
            more = more and self.stream.here(self.feed.views(epoch + 1))
        if self.streamed:
            self.world.barrier()  # no rank waits for a GPU while another one waits for a view
        if self.targets is not None:
            self.targets.begin_epoch(self.feed.views(epoch), self.feed.views(epoch + 1) if more else None)
            self._say_where_rows_are()
        if isinstance(self.targets, CachedTargets) and self.world.first and not self.judged:
            self.judged = True
            for text in self.targets.at_chance(self.labels):
                self.progress.warning(text)

    def _say_where_rows_are(self) -> None:
        """On a GPU or not; in the first epoch, and again if that changes."""
        if not isinstance(self.targets, CachedTargets) or self.world.device.type != "cuda":
            return
        on_gpu = self.targets.device_bytes > 0
        if on_gpu != self.rows_on_gpu:
            self.rows_on_gpu = on_gpu
            self.progress.info(
                f"teacher rows of an epoch: {human_bytes(self.targets.device_bytes)} on {self.world.device}"
                if on_gpu
                else f"teacher rows are copied to {self.world.device} with every batch: those of an epoch do not fit "
                f"there (at most --cache-memory, and {SHARE_OF_GPU:.0%} of its free memory)"
            )

    def _step(self, item: TrainBatch) -> None:
        """One step of every member on one batch. Nothing in it waits for a GPU."""
        plan, (pixels, labels, partner_labels, mix_weights) = item
        mix = None if partner_labels is None or mix_weights is None else Mix(partner_labels, mix_weights)
        teacher = None if self.targets is None else self.targets(plan, pixels)
        progress = TrainingProgress(plan.epoch + plan.batch / plan.batches, self.feed.epochs)
        rank_weight = len(pixels) * self.world.size / plan.global_size
        for member in self.members:
            member.step(pixels, teacher, labels, mix, progress, rank_weight)

    def _between_batches(self, plan: BatchPlan) -> None:
        """Report, stop at a diverged loss, save if due, stop on a signal. All ranks call this at the same batches."""
        self._report(plan)
        due = time.monotonic() - self.last_save > 60 * self.options.checkpoint_minutes
        diverged = [member.loss_diverged for member in self.members]
        stop, due, *diverged = self.world.any(bool(self.stop), due, *diverged)
        where = f"epoch {plan.epoch + 1}, batch {plan.batch + 1}"
        self._refuse_diverged(diverged, "loss is", where)
        if plan.last:
            return  # the end of the epoch saves
        if stop or due:
            self._refuse_infinite_weights(where)
            self._save(plan.epoch, plan.batch + 1)
        if stop:
            self._interrupt()

    def _report(self, plan: BatchPlan) -> None:
        """Images done and in all, estimated from this batch: batches differ by at most one image."""
        epoch_images = plan.global_size * plan.batches
        done = plan.epoch * epoch_images + (plan.batch + 1) * plan.global_size
        means = {name: f"{value:.3f}" for name, value in self.members[0].loss_means().items()}
        waiting = f"{self.throughput.times().waiting:.0%}"
        total = self.feed.epochs * epoch_images
        self.progress.advance("train", done, total, epoch=plan.epoch + 1, **means, wait=waiting)

    # -- the end of an epoch ------------------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> list[Metrics | None]:
        times = self.throughput.times()
        self._refuse_infinite_weights(f"the end of epoch {epoch + 1}")
        self._gather_loss_sums()
        metrics = self._validate()
        rows = self.files.end_epoch(epoch, metrics, times)
        for member in self.members:
            member.reset_loss_sums()
        self.progress.epoch(rows)
        self._save(epoch + 1, 0)
        (stop,) = self.world.any(bool(self.stop))
        if stop and epoch + 1 < self.feed.epochs:
            self._interrupt()
        self.throughput.start()
        return metrics

    def _validate(self) -> list[Metrics | None]:
        """The metrics of every member over all ranks' shares of the validation images."""
        if self.validation is None:
            return [None] * len(self.members)
        for member in self.members:  # each rank has its own running statistics of batch norms
            self.world.broadcast(member.student.buffers())
        students = [(member.student, member.normalise) for member in self.members]
        of_ranks = self.world.gather(self.validation.metric_sums(students, self.world.device, self.members[0].amp))
        return [sum(of_member[1:], of_member[0]).metrics() for of_member in zip(*of_ranks, strict=True)]

    # -- saving and stopping ------------------------------------------------------------------------------------------

    def _save(self, epoch: int, batch: int) -> None:
        """The state after `batch` batches of `epoch`."""
        self._gather_loss_sums()
        if self.world.first:
            save_checkpoint(
                self.options.out,
                self.members,
                self.fixed,
                self.use,
                epoch=epoch,
                batch=batch,
            )
        self.world.barrier()
        self.last_save = time.monotonic()

    def _gather_loss_sums(self) -> None:
        """Move the loss sums of all ranks to rank 0."""
        if self.world.size == 1:
            return
        of_ranks = self.world.gather([member.loss_sums() for member in self.members])
        for i, member in enumerate(self.members):
            member.reset_loss_sums()
            for of_members in of_ranks if self.world.first else ():
                member.add_loss_sums(*of_members[i])

    def _refuse_infinite_weights(self, where: str) -> None:
        """The last step may have made weights infinite while its loss was finite; such weights must not be saved."""
        diverged = self.world.any(*(not member.weights_finite for member in self.members))
        self._refuse_diverged(diverged, "weights are", where)

    def _refuse_diverged(self, diverged: list[bool], what: str, where: str) -> None:
        for member, is_diverged in zip(self.members, diverged, strict=True):
            if is_diverged:
                out = self.options.out
                saved = (
                    f"the checkpoint in {out} is from before that" if has_checkpoint(out) else "no checkpoint was saved"
                )
                raise Diverged(
                    f"{member.spec.name}: the {what} no longer finite at {where}; {saved}. Try a lower --lr, "
                    "--clip-grad or more --warmup-epochs, with another --out"
                )

    def _interrupt(self) -> None:
        """Stop every rank, including those that received no signal."""
        self.stop.number = self.stop.number or 15
        self.stop.raise_if_set(RESUME)
