"""`train --dry-run`: everything is opened and checked, one step is done on real data, nothing is written to `out`."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from redistill_cache import Archive

from redistill.devices import fastest_convolutions
from redistill.interrupts import raise_on_signals, stop_on_signals
from redistill.progress import NoProgress, Progress
from redistill.ranks import World, joined_world
from redistill.training.checkpoint import has_checkpoint, saved_use
from redistill.training.loop import Training, refuse_earlier_run
from redistill.training.member import Member
from redistill.training.options import TrainOptions
from redistill.training.prepare import prepare
from redistill.training.run_files import RunFiles, refuse_foreign_folder
from redistill.training.settings import settings_in_effect
from redistill.training.targets import CachedTargets

__all__ = ["DryRun", "dry_run"]

# The last checkpoint, the one before it, and the next one while it is being written.
CHECKPOINTS = 3


@dataclass(frozen=True)
class DryRun:
    """What a run will need. Bytes are of this process where there are several."""

    epochs: int
    steps_per_epoch: int
    steps: int
    images: int
    """Trained on in an epoch, over all ranks."""
    validation_images: int | None
    parameters: Mapping[str, int]
    """By member; so are losses."""
    losses: Mapping[str, float]
    """Of the first batch, before the step."""
    step_seconds: float
    """Of the first step, which includes the start of workers and of the device's libraries."""
    device: str
    peak_memory_bytes: int
    """Of the device, or of the process on a CPU, after the first step."""
    teacher_rows_bytes: int
    """Resident teacher rows: two epochs' views."""
    teacher_rows_on_disk: bool
    disk_bytes: int
    """Checkpoints and weights in `out`, without logs."""
    free_bytes: int
    resumes: bool
    """Whether `out` holds a run, which `train` would resume."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def dry_run(options: TrainOptions, progress: Progress | None = None, *, archive: Archive | None = None) -> DryRun:
    """Prepare a run as `train` does, and do its first step. Every rank must call it."""
    with joined_world(options.device) as world, fastest_convolutions(world.device), stop_on_signals() as stop:
        if progress is None or not world.first:
            progress = NoProgress()
        refuse_earlier_run(options)
        refuse_foreign_folder(options)
        with raise_on_signals():
            saved, _ = saved_use(options.out, progress)
            setup = prepare(options, world, progress, saved, archive=archive)
        progress.settings(settings_in_effect(options, setup, world))
        files = RunFiles(options, setup, first_epoch=0, writes=False)
        setup.fit()
        training = Training(options, world, setup, files, progress, stop)
        started = time.perf_counter()
        training.first_step()
        seconds = time.perf_counter() - started
        stop.raise_if_set()
        batches = setup.feed.global_batches(0)
        views = setup.targets.shared_views if isinstance(setup.targets, CachedTargets) else None
        return DryRun(
            epochs=setup.feed.epochs,
            steps_per_epoch=len(batches),
            steps=len(batches) * setup.feed.epochs,
            images=sum(map(len, batches)),
            validation_images=None if setup.validation is None else int((setup.validation.labels >= 0).sum()),
            parameters={member.spec.name: member.num_parameters for member in setup.members},
            losses={member.spec.name: member.loss_means()["loss"] for member in setup.members},
            step_seconds=seconds,
            device=str(world.device),
            peak_memory_bytes=peak_memory(world),
            teacher_rows_bytes=0 if views is None else views.needed_bytes,
            teacher_rows_on_disk=views is not None and views.spilled,
            disk_bytes=sum(disk_bytes(member, best=setup.validation is not None) for member in setup.members),
            free_bytes=free_bytes(options.out),
            resumes=has_checkpoint(options.out),
        )


def peak_memory(world: World) -> int:
    """The most memory that was allocated on the device, or by this process on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def disk_bytes(member: Member, *, best: bool) -> int:
    """What a member adds to `out`: its part of the checkpoints, and the final weights and those of the best epoch."""
    weights = tensor_bytes(member.student.state_dict())
    return CHECKPOINTS * tensor_bytes(member.state()) + (2 if best else 1) * weights


def tensor_bytes(state: object) -> int:
    """The bytes of all tensors in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(tensor_bytes, state.values()))
    return sum(map(tensor_bytes, state)) if isinstance(state, list | tuple) else 0


def free_bytes(path: Path) -> int:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
