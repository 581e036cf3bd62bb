"""Where everything of an archive lies and how each array is cut: pure functions of the specification.

A zarr.json is written from here and, when an archive is read, compared byte by byte with what is made here. Metadata
that came with an archive is never interpreted, so it cannot lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from redistill_cache import limits
from redistill_cache.array_layout import ArrayLayout
from redistill_cache.arrays import CHUNK_BYTES, ArraySpec, SideArray
from redistill_cache.errors import UsageError
from redistill_cache.spec import ArchiveSpec, SignalSpec, TeacherSpec
from redistill_cache.strict_json import Json, canonical

__all__ = [
    "BLOCKS",
    "CANARY_SHAPE",
    "MANIFEST",
    "ArrayLayout",
    "Block",
    "canary_arrays",
    "check_extent",
    "count_files",
    "expected_metadata",
    "part_arrays",
    "sample_arrays",
    "side_arrays",
    "teacher_arrays",
    "view_arrays",
]

JOURNAL = "_redistill"
BLOCKS = f"{JOURNAL}/blocks"
MANIFEST = f"{JOURNAL}/manifest.json"
NOTES = f"{JOURNAL}/notes"
QUARANTINE = f"{JOURNAL}/quarantine"

CANARY_SHAPE = (8, 8, 3)


@dataclass(frozen=True)
class Block:
    """The unit of commit: rows [start, stop) of one view, across all arrays of one part."""

    part: str  # "samples", "views", "canaries", "teachers/<name>", "teachers/<name>/side"
    view: int
    index: int
    start: int
    stop: int

    @property
    def record_path(self) -> str:
        return f"{BLOCKS}/{self.part.replace('/', '.')}.{self.view}.{self.index}.json"

    @property
    def rows(self) -> range:
        return range(self.start, self.stop)

    def __str__(self) -> str:
        return f"{self.part} view {self.view} block {self.index}"


# -- the arrays of each part ------------------------------------------------------------------------------------------


def _whole(path: str, dtype: str, shape: tuple[int, ...], level: int | None = 3) -> ArrayLayout:
    """An array without views, in one shard of chunks of about a mebibyte."""
    row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    chunk_rows = max(1, min(shape[0], CHUNK_BYTES // row_bytes))
    shard_rows = -(-shape[0] // chunk_rows) * chunk_rows
    return ArrayLayout(path, dtype, shape, 0, shard_rows, chunk_rows, level=level)


def sample_arrays(spec: ArchiveSpec, key_bytes: int) -> dict[str, ArrayLayout]:
    """Keys, digests, labels and sizes; `key_bytes` is the length of all keys together, which the spec does not know.

    Digests do not compress and are stored as they are: the number of samples is then bounded by bytes really there.
    """
    n = spec.num_samples
    return {
        "key_bytes": _whole("samples/key_bytes", "uint8", (key_bytes,)),
        "key_offsets": _whole("samples/key_offsets", "uint64", (n + 1,)),
        "digest": _whole("samples/digest", "uint8", (n, 32), level=None),
        "label": _whole("samples/label", "int64", (n,)),
        "size": _whole("samples/size", "uint32", (n, 2)),
    }


def _per_view(folder: str, array: ArraySpec, spec: ArchiveSpec) -> ArrayLayout:
    assert array.chunk_rows is not None, "specs are resolved before anything is laid out"
    return ArrayLayout(
        path=f"{folder}/{array.name}",
        dtype=array.dtype,
        shape=(spec.num_views, spec.num_samples, *array.row_shape),
        row_axis=1,
        shard_rows=spec.block_rows,
        chunk_rows=array.chunk_rows,
        transpose=array.transpose,
        level=array.level,
    )


def view_arrays(spec: ArchiveSpec) -> dict[str, ArrayLayout]:
    return {array.name: _per_view("views", array, spec) for array in spec.view_arrays}


def canary_arrays(spec: ArchiveSpec) -> dict[str, ArrayLayout]:
    count = spec.canaries_per_view
    if not count:
        return {}
    lead = (spec.num_views, count)
    return {
        "row": ArrayLayout("canaries/row", "uint32", lead, 1, count, count),
        "pixels": ArrayLayout("canaries/pixels", "uint8", (*lead, *CANARY_SHAPE), 1, count, count),
    }


def teacher_arrays(spec: ArchiveSpec, teacher: TeacherSpec) -> dict[str, ArrayLayout]:
    """Per-row arrays of all signals of a teacher, by "<signal>/<array>"."""
    return {
        f"{signal.name}/{array.name}": _per_view(f"teachers/{teacher.name}/{signal.name}", array, spec)
        for signal in teacher.signals
        for array in signal.arrays
    }


def _side_folder(teacher: TeacherSpec, signal: SignalSpec) -> str:
    return f"teachers/{teacher.name}/{signal.name}/side"


def _side_array(folder: str, side: SideArray) -> ArrayLayout:
    return _whole(f"{folder}/{side.name}", side.dtype, side.shape)


def side_arrays(teacher: TeacherSpec) -> dict[str, ArrayLayout]:
    """Side data of all signals of a teacher, by "<signal>/<array>"."""
    return {
        f"{signal.name}/{side.name}": _side_array(_side_folder(teacher, signal), side)
        for signal in teacher.signals
        for side in signal.side
    }


def part_arrays(spec: ArchiveSpec, teachers: dict[str, TeacherSpec], part: str) -> dict[str, ArrayLayout]:
    """The arrays of a part that is written in blocks of rows or of canaries."""
    if part == "views":
        return view_arrays(spec)
    if part == "canaries":
        return canary_arrays(spec)
    name = part.removeprefix("teachers/")
    if not part.startswith("teachers/") or name not in teachers:
        known = ["views", "canaries", *(f"teachers/{name}" for name in sorted(teachers))]
        raise UsageError(f"no part {part!r} in this archive; parts written in blocks: {', '.join(known)}")
    return teacher_arrays(spec, teachers[name])


# -- metadata files -------------------------------------------------------------------------------------------------


def _group(attributes: dict[str, Json]) -> bytes:
    return canonical({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def root_metadata(spec: ArchiveSpec) -> bytes:
    return _group({"redistill": spec.to_json()})


def teacher_path(name: str) -> str:
    return f"teachers/{name}/zarr.json"


def teacher_metadata(teacher: TeacherSpec) -> bytes:
    return _group({"redistill_teacher": teacher.to_json()})


def expected_metadata(spec: ArchiveSpec, teachers: dict[str, TeacherSpec]) -> dict[str, bytes]:
    """Every zarr.json below the root but those of teachers' groups and of samples/key_bytes: path -> bytes."""
    arrays = [
        *(array for name, array in sample_arrays(spec, 1).items() if name != "key_bytes"),
        *view_arrays(spec).values(),
        *canary_arrays(spec).values(),
    ]
    groups = ["samples", "teachers"]
    groups += ["views"] if spec.view_arrays else []
    groups += ["canaries"] if spec.canaries_per_view else []
    for teacher in teachers.values():
        arrays += [*teacher_arrays(spec, teacher).values(), *side_arrays(teacher).values()]
        for signal in teacher.signals:
            groups.append(f"teachers/{teacher.name}/{signal.name}")
            groups += [_side_folder(teacher, signal)] if signal.side else []
    files = {f"{group}/zarr.json": _group({}) for group in groups}
    files |= {array.metadata_path: array.metadata_bytes() for array in arrays}
    return files


def count_files(spec: ArchiveSpec, teachers: dict[str, TeacherSpec], views: int) -> int:
    """An upper bound of the files of an archive, from checked numbers alone: before anything is made of them."""
    per_row_block = len(spec.view_arrays) + bool(spec.view_arrays)
    per_row_block += sum(1 + sum(len(s.arrays) for s in teacher.signals) for teacher in teachers.values())
    signals = [signal for teacher in teachers.values() for signal in teacher.signals]
    constant = 32 + 4 * len(teachers) + sum(2 + len(s.arrays) + 2 * len(s.side) for s in signals)
    return constant + views * (spec.blocks_per_view * per_row_block + 3)


def check_extent(spec: ArchiveSpec, teachers: dict[str, TeacherSpec]) -> None:
    """Refuse what would make too many files or too many arrays."""
    files = count_files(spec, teachers, spec.num_views)
    if files > limits.MAX_FILES:
        raise UsageError(
            f"{spec.num_views} views in blocks of {spec.block_rows} rows would make {files} files, more than the "
            f"limit of {limits.MAX_FILES}; choose more rows per block"
        )
    arrays = sum(len(s.arrays) + len(s.side) for teacher in teachers.values() for s in teacher.signals)
    if arrays > limits.MAX_ARRAYS_IN_ALL:
        raise UsageError(
            f"{len(teachers)} teachers with {arrays} arrays, more than the limit of {limits.MAX_ARRAYS_IN_ALL}; "
            "use another archive for some of them"
        )
