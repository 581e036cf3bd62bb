"""Estimate the size and time of an archive from the pilot: bytes from its encoded rows, hours from its throughput."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from redistill_cache import SignalSpec, TeacherSpec, layout
from redistill_cache.codecs import BlockStats, Codec
from redistill_cache.codecs.catalogue import Choice
from redistill_cache.errors import Refused
from redistill_cache.journal import FileEntry, Record
from redistill_cache.keys import pack_keys
from redistill_cache.layout import Block
from redistill_cache.machine import usable_cores
from redistill_cache.shards import encode_shard
from redistill_cache.spec import ArchiveSpec
from redistill_cache.wording import human_bytes

from redistill.caching.encode_rows import encode_on_gpu, refuse_full_device
from redistill.caching.pilot import Pilot
from redistill.caching.plan import Plan

__all__ = ["Estimate", "estimate", "existing_parent", "refuse_small_disk", "teacher_spec"]

# A typical file entry, to estimate the length of a record.
SAMPLE_ENTRY = FileEntry(100_000, "0" * 64)
# A line of the manifest holds a file's path, and its hash and size with quotes, brackets and commas.
MANIFEST_LINE_BYTES = 64 + 16
SAFETY_FACTOR = 1.02


@dataclass(frozen=True)
class Estimate:
    """Cost of the whole archive, or of what is added to a teacher; blocks that exist are not subtracted."""

    samples: int
    views: int
    blocks: int
    files: int
    signal_bytes: int
    """The teacher's arrays and side data."""
    view_bytes: int
    """View parameters and canaries."""
    other_bytes: int
    """The sample index, metadata, commit records and the manifest."""
    bytes_per_view: float
    """The teacher's arrays only."""
    images_per_second: float
    """Of all shares together, extrapolated from this process's pilot: rendering, the teacher and encoding."""
    seconds: float
    device: str
    device_hours: float
    free_bytes: int
    pilot_rows: int
    teacher_top1: float | None
    codecs: Mapping[str, str]
    """Per signal, the codec and why it was chosen."""

    @property
    def total_bytes(self) -> int:
        return self.signal_bytes + self.view_bytes + self.other_bytes

    @property
    def break_even(self) -> str:
        """The number of epochs of online distillation that take the same teacher time."""
        return (
            f"after {self.views} epoch{'s' * (self.views > 1)} of online distillation; further epochs, students, seeds "
            "and losses need no teacher"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"total_bytes": self.total_bytes, "break_even": self.break_even}


def teacher_spec(plan: Plan, codecs: Mapping[str, Codec]) -> TeacherSpec:
    """The specification of the part that is written. It records the zstd levels, so resumed runs use them."""
    signals, level = (SignalSpec.of(name, codec) for name, codec in codecs.items()), plan.options.zstd_level
    if level is not None:
        signals = (
            replace(signal, arrays=tuple(replace(array, level=level) for array in signal.arrays)) for signal in signals
        )
    return TeacherSpec(plan.part.name, tuple(signals), plan.model, plan.part.adds_to)


def estimate(plan: Plan, pilot: Pilot, choices: Mapping[str, Choice]) -> Estimate:
    """The cost of the whole archive with these codecs."""
    spec = plan.spec.resolved()
    codecs = {name: choice.codec for name, choice in choices.items()}
    teacher = teacher_spec(plan, codecs).resolved(spec.block_rows)
    total_views = spec.num_samples * spec.num_views
    bytes_per_view, stats = signal_bytes(spec, teacher, choices)
    side = {f"{name}/{key}": array for name, codec in codecs.items() for key, array in codec.side().items()}
    side_bytes = sum(len(encode_shard(array, side[name])) for name, array in layout.side_arrays(teacher).items())
    other, files = other_bytes(plan, spec, teacher, stats)
    device_seconds = total_views * (1.0 / pilot.images_per_second + encoding_seconds(plan, pilot, choices))
    seconds = device_seconds / plan.share.count
    return Estimate(
        samples=spec.num_samples,
        views=spec.num_views,
        blocks=spec.num_views * spec.blocks_per_view,
        files=files,
        signal_bytes=round(bytes_per_view * total_views) + side_bytes,
        view_bytes=0 if plan.part.adds_to else round(view_params_bytes(plan, spec) * total_views) + canary_bytes(spec),
        other_bytes=other,
        bytes_per_view=bytes_per_view,
        images_per_second=total_views / seconds,
        seconds=seconds,
        device=str(plan.teacher.device),
        device_hours=device_seconds / 3600,
        free_bytes=free_bytes(plan.options.out),
        pilot_rows=len(pilot),
        teacher_top1=pilot.correct / pilot.labelled if pilot.labelled else None,
        codecs={name: choice.reason for name, choice in choices.items()},
    )


def encoding_seconds(plan: Plan, pilot: Pilot, choices: Mapping[str, Choice]) -> float:
    """Of the signals of a view: on a GPU its own, beside the teacher; else a share of the cores that both use."""
    device = plan.teacher.device
    if device.type != "cuda":
        cores = max(1, usable_cores() // plan.share.local_count)
        return sum(choice.best.cpu_seconds_per_row for choice in choices.values()) / cores
    total = 0.0
    for name, choice in choices.items():
        rows = torch.from_numpy(pilot.rows[name][-len(choice.best.encoded) :]).to(device)
        with refuse_full_device(len(rows), device, plan.options.batch_size):
            encode_on_gpu(choice.codec, rows)  # compiles kernels
            start = time.perf_counter()
            encode_on_gpu(choice.codec, rows)
            total += (time.perf_counter() - start) / len(rows)
    return total


def signal_bytes(
    spec: ArchiveSpec, teacher: TeacherSpec, choices: Mapping[str, Choice]
) -> tuple[float, dict[str, Any]]:
    """Bytes per view of the teacher's shards, with the codecs' trial rows written as one block; and its statistics."""
    total, stats, layouts = 0.0, {}, layout.teacher_arrays(spec, teacher)
    for name, choice in choices.items():
        encoded = choice.best.encoded
        stats[name] = BlockStats.of(encoded).to_json()
        rows = min(len(encoded), spec.block_rows, spec.num_samples)
        for key, array in encoded.arrays.items():
            total += len(encode_shard(layouts[f"{name}/{key}"], np.asarray(array)[:rows])) / rows
    return total, stats


def view_params_bytes(plan: Plan, spec: ArchiveSpec) -> float:
    """Bytes per view of the shards of view parameters, measured on the first block."""
    rows = np.arange(min(spec.block_rows, spec.num_samples))
    params = plan.views.params(0, rows)
    arrays = layout.view_arrays(spec)
    return sum(len(encode_shard(arrays[name], params[name])) for name in arrays) / len(rows)


def canary_bytes(spec: ArchiveSpec) -> int:
    """Uncompressed size: canary fingerprints look like noise and hardly compress."""
    return spec.num_views * sum(array.index_bytes + array.chunk_bytes for array in layout.canary_arrays(spec).values())


def other_bytes(plan: Plan, spec: ArchiveSpec, teacher: TeacherSpec, stats: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the sample index, metadata, records and manifest; and the number of files in the archive."""
    index = plan.index
    keys = pack_keys(index.keys)
    samples = {
        "key_bytes": keys.data,
        "key_offsets": keys.offsets,
        "digest": index.digests,
        "label": index.labels,
        "size": index.sizes,
    }
    layouts = layout.sample_arrays(spec, len(keys.data))
    total = sum(len(encode_shard(layouts[name], array)) for name, array in samples.items())
    teachers = {teacher.name: teacher}
    metadata = layout.expected_metadata(spec, teachers) | {
        "zarr.json": layout.root_metadata(spec),
        layout.teacher_path(teacher.name): layout.teacher_metadata(teacher),
    }
    total += sum(map(len, metadata.values()))
    paths = list(metadata)
    parts = {"views": layout.view_arrays(spec), "canaries": layout.canary_arrays(spec)}
    for part, arrays in (parts | {plan.folder: layout.part_arrays(spec, teachers, plan.folder)}).items():
        if not arrays:
            continue
        blocks = spec.num_views * (1 if part == "canaries" else spec.blocks_per_view)
        block = Block(part, 0, 0, 0, spec.block_rows)
        shards = [array.shard_path(0, 0) for array in arrays.values()]
        record = Record(block, "0" * 64, dict.fromkeys(shards, SAMPLE_ENTRY), stats if part == plan.folder else None)
        total += blocks * len(record.to_bytes())
        paths += [*shards, block.record_path] * blocks
    return total + sum(len(path) + MANIFEST_LINE_BYTES for path in paths), len(paths)


def refuse_small_disk(path: Path, needed: int) -> None:
    """Refuse to start when fewer than about `needed` bytes are free."""
    free = free_bytes(path)
    if needed * SAFETY_FACTOR > free:
        raise Refused(
            f"{path}: needs about {human_bytes(needed)}, found {human_bytes(free)} free; free some space, or use "
            "another disk, fewer --views or a coarser --fidelity"
        )


def free_bytes(path: Path) -> int:
    return shutil.disk_usage(existing_parent(path)).free


def existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
