"""The end of stage 1: seal, leave a note, say what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from redistill_cache import ArchiveWriter, open_archive
from redistill_cache.inspect import describe

from redistill.caching.encoder import Written
from redistill.caching.plan import Plan
from redistill.caching.watcher import Watcher
from redistill.teacher_check import TeacherCheck

__all__ = ["CacheResult", "finish", "merged", "result", "warn_of_chance"]

# Fewer right answers than this many times chance, and something is wrong with weights, preprocessing or class order.
TIMES_CHANCE = 2.0
ENOUGH_LABELS = 256


@dataclass(frozen=True)
class CacheResult:
    """What is there when stage 1 ends. `id` is None where another teacher's blocks, or another rank's, are missing."""

    path: str
    id: str | None
    samples: int
    views: int
    images: int
    """Views the teacher was asked about by this run."""
    seconds: float
    images_per_second: float | None
    total_bytes: int
    bytes_per_view: float
    teacher: str
    teacher_top1: float | None
    """Over the labelled views of this run."""
    floor: float | None
    """Largest difference of logits between the same views in two batch compositions."""
    missing: tuple[str, ...] = ()
    """Parts that still have to be written before the archive can be sealed."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def finish(
    plan: Plan, writer: ArchiveWriter, written: Sequence[Written], check: TeacherCheck | None, seconds: float
) -> tuple[str | None, tuple[str, ...]]:
    """Note how it went and seal, which the first rank does; the archive's id, or what is missing for one."""
    if not plan.rank.first:
        return None, ()
    missing = tuple(part for part in writer.parts() if writer.missing(part))
    rows = sum(w.rows for w in written)
    if rows:
        writer.note(
            f"cache-teacher-{plan.teacher_name}",
            {
                "images": rows,
                "seconds": round(seconds, 3),
                "teacher_top1": merged(written).top1,
                "floor": None if check is None else check.floor,
                "relative_floor": None if check is None else check.relative_floor,
                "device": device_name(plan.teacher.device),
                "processes": plan.rank.world,
                "environment": dict(plan.spec.environment),
                "command": plan.options.command,
            },
        )
    return (None if missing else writer.seal()), missing


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def merged(written: Sequence[Written]) -> Written:
    return Written(**{key: sum(getattr(w, key) for w in written) for key in asdict(Written())})


def warn_of_chance(plan: Plan, written: Sequence[Written], watcher: Watcher) -> None:
    whole, chance = merged(written), 1 / plan.spec.num_classes
    if whole.top1 is not None and whole.labelled >= ENOUGH_LABELS and whole.top1 < min(TIMES_CHANCE * chance, 0.9):
        watcher.warn(
            f"the teacher is right on {whole.top1:.1%} of the views, chance is {chance:.1%}: are its weights, its "
            "normalisation and the order of the classes right?"
        )


def result(
    plan: Plan,
    writer: ArchiveWriter,
    written: Sequence[Written],
    check: TeacherCheck | None,
    seconds: float,
    identity: str | None,
    missing: tuple[str, ...],
) -> CacheResult:
    whole = merged(written)
    found = describe(writer.read_back() if identity is None else open_archive(writer.path))
    return CacheResult(
        path=str(plan.options.out),
        id=identity,
        samples=plan.spec.num_samples,
        views=plan.spec.num_views,
        images=whole.rows,
        seconds=seconds,
        images_per_second=whole.rows / seconds if whole.rows else None,
        total_bytes=found["total_bytes"],
        bytes_per_view=sum(signal["bytes_per_view"] for signal in found["teachers"][plan.teacher_name].values()),
        teacher=plan.teacher_name,
        teacher_top1=whole.top1,
        floor=None if check is None else check.floor,
        missing=missing,
    )
