"""The end of stage 1: seal, leave a note, say what is there."""

from __future__ import annotations

import contextlib
import datetime
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from redistill_cache import open_archive
from redistill_cache.errors import Refused
from redistill_cache.inspect import describe

from redistill.caching.encoder import Written
from redistill.caching.opening import Opened
from redistill.caching.plan import Plan
from redistill.caching.watcher import Watcher
from redistill.teacher_check import TeacherCheck

__all__ = ["CacheResult", "Run", "leave_note", "result", "seal", "warn_of_chance"]

# Fewer right answers than this many times chance, and something is wrong with weights, preprocessing or class order;
# with few classes, where that is all of them, fewer than so much of the way up from chance.
TIMES_CHANCE, WAY_UP = 2.0, 0.25
ENOUGH_LABELS = 256


@dataclass
class Run:
    """What one process did, as far as it has come."""

    began: datetime.datetime = field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    start: float = field(default_factory=time.perf_counter)
    check: TeacherCheck | None = None
    written: Written = field(default_factory=Written)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


@dataclass(frozen=True)
class CacheResult:
    """What is there when stage 1 ends. `id` is None where another teacher's blocks, or another rank's, are missing."""

    path: str
    id: str | None
    samples: int
    views: int
    images: int
    """Views whose answers this process has committed."""
    seconds: float
    images_per_second: float | None
    total_bytes: int
    bytes_per_view: float
    teacher: str
    teacher_top1: float | None
    """Over the labelled views of this process."""
    floor: float | None
    """Largest difference of logits between the same views in two batch compositions."""
    missing: tuple[str, ...] = ()
    """Parts that still have to be written before the archive can be sealed."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def warn_of_chance(plan: Plan, right: int, labelled: int, watcher: Watcher) -> None:
    """Train mode, wrong preprocessing, and classes in another order all look like this."""
    chance = 1 / plan.spec.num_classes
    enough = min(TIMES_CHANCE * chance, chance + WAY_UP * (1 - chance))
    if labelled >= ENOUGH_LABELS and right < enough * labelled:
        watcher.warn(
            f"the teacher is right on {right / labelled:.1%} of {labelled:,} views, chance is {chance:.1%}: are its "
            "weights, its normalisation and the order of the classes right?"
        )


def leave_note(there: Opened, run: Run) -> None:
    """How it went, for whoever wonders; a run that commits nothing leaves none. No part of the archive's identity."""
    plan, written, check = there.plan, run.written, run.check
    if not written.blocks:
        return
    note = {
        "began": run.began.isoformat(timespec="seconds"),
        "command": plan.options.command,
        "device": device_name(plan.teacher.device),
        "environment": dict(plan.spec.environment),
        "rank": plan.rank.rank,
        "processes": plan.rank.world,
        "seconds": round(run.seconds, 3),
        "images_per_second": round(written.rows / run.seconds, 3),
        "blocks": written.blocks,
        "images": written.rows,
        "bytes": written.bytes,
        "labelled": written.labelled,
        "right": written.right,
        "teacher_top1": written.top1,
        "floor": None if check is None else check.floor,
        "relative_floor": None if check is None else check.relative_floor,
    }
    with contextlib.suppress(Refused):  # a disk that is full must not hide why the run ends
        there.writer.note(f"{plan.teacher_name}-{run.began:%Y%m%dt%H%M%S}-{plan.rank.rank}", note)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seal(there: Opened) -> tuple[str | None, tuple[str, ...]]:
    """The archive's id, or what is missing for one. The first rank seals."""
    writer = there.writer
    if not there.plan.rank.first:
        return None, ()
    missing = tuple(part for part in writer.parts() if writer.missing(part))
    return (None if missing else writer.seal()), missing


def result(there: Opened, run: Run, identity: str | None, missing: tuple[str, ...]) -> CacheResult:
    """All of it in a few numbers."""
    plan, written, seconds = there.plan, run.written, run.seconds
    found = describe(there.writer.read_back() if identity is None else open_archive(there.writer.path))
    return CacheResult(
        path=str(plan.options.out),
        id=identity,
        samples=plan.spec.num_samples,
        views=plan.spec.num_views,
        images=written.rows,
        seconds=seconds,
        images_per_second=written.rows / seconds if written.rows else None,
        total_bytes=found["total_bytes"],
        bytes_per_view=sum(signal["bytes_per_view"] for signal in found["teachers"][plan.teacher_name].values()),
        teacher=plan.teacher_name,
        teacher_top1=written.top1,
        floor=None if run.check is None else run.check.floor,
        missing=missing,
    )
