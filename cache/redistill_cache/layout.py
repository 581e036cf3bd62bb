"""The files of an archive and how each array is cut into them: pure functions of the specification.

A writer writes the zarr.json files generated here, and a reader compares those of an archive with them byte by byte, so
that it never has to interpret one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from redistill_cache import limits
from redistill_cache.errors import UsageError
from redistill_cache.spec import CHUNK_BYTES, ArchiveSpec, ArraySpec, SignalSpec, TeacherSpec
from redistill_cache.strict_json import Json, canonical

__all__ = [
    "BLOCKS",
    "CHECKSUM",
    "MANIFEST",
    "SIGNATURE",
    "ArrayLayout",
    "Block",
    "all_blocks",
    "canary_arrays",
    "check_extent",
    "count_files",
    "expected_files",
    "expected_metadata",
    "part_arrays",
    "part_blocks",
    "parts",
    "row_block",
    "sample_arrays",
    "samples_block",
    "side_arrays",
    "side_block",
    "teacher_arrays",
    "teacher_of_file",
    "view_arrays",
    "view_of_file",
]


# -- one array --------------------------------------------------------------------------------------------------------

INDEX_ENTRY = 16  # offset and length, little-endian uint64
CHECKSUM = 4  # CRC-32C, of the index and of chunks that are not compressed


@dataclass(frozen=True)
class ArrayLayout:
    """One zarr array: its folder, its shape, and how it is cut into shards (files) and inner chunks.

    `row_axis` is 1 for arrays [view, sample, ...] and 0 for arrays without views. Axes after it are never cut. A shard
    holds `shard_rows` consecutive rows of one view, a chunk `chunk_rows` of them.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    row_axis: int
    shard_rows: int
    chunk_rows: int
    transpose: bool = False
    level: int | None = 3  # of zstd; None stores chunks uncompressed, with a CRC-32C

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[self.row_axis + 1 :]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        return self.row_bytes * math.prod(self.shape[: self.row_axis + 1])

    @property
    def chunk_bytes(self) -> int:
        return self.chunk_rows * self.row_bytes

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        return self.chunks_per_shard * INDEX_ENTRY + CHECKSUM

    @property
    def stored_bytes(self) -> int:
        """Size of the one shard of an array that is not compressed."""
        assert self.level is None
        used = self.used_chunks(self.shape[self.row_axis])
        return used * (self.chunk_bytes + CHECKSUM) + self.index_bytes

    @property
    def most_chunk_bytes(self) -> int:
        """A stored chunk takes at most this: bytes that do not compress make a zstd frame slightly larger."""
        return self.chunk_bytes + self.chunk_bytes // 16 + 1024

    def most_bytes(self, rows: int) -> int:
        """The file of a shard with this many rows takes at most this.

        The last chunk may hold few rows: its padding of zeros takes next to nothing, or a few bytes per column if the
        chunk is transposed.
        """
        whole, rest = divmod(rows, self.chunk_rows)
        last = rest * self.row_bytes * 17 // 16 + 16 * self.row_bytes + self.chunk_bytes // 1024 + 1024
        if self.level is None:
            last = self.chunk_bytes + CHECKSUM
        return whole * self.most_chunk_bytes + (min(last, self.most_chunk_bytes) if rest else 0) + self.index_bytes

    def used_chunks(self, rows: int) -> int:
        """Chunks of a shard that hold at least one of its first `rows` rows."""
        return -(-rows // self.chunk_rows)

    @property
    def metadata_path(self) -> str:
        return f"{self.path}/zarr.json"

    def shard_path(self, view: int, index: int) -> str:
        coordinates = [view] * self.row_axis + [index] + [0] * len(self.row_shape)
        return f"{self.path}/c.{'.'.join(map(str, coordinates))}"

    def metadata(self, shape: tuple[int, ...] | None = None) -> dict[str, Json]:
        """The zarr.json of this array; `shape` replaces the shape of the array when a single shard is encoded."""
        lead = [1] * self.row_axis
        names = [*["view"] * self.row_axis, "sample", *[None] * len(self.row_shape)]
        if self.row_axis == 0:
            names[0] = None  # rows of offsets and of side data are not samples
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape or self.shape),
            "data_type": self.dtype,
            "chunk_grid": _regular([*lead, self.shard_rows, *self.row_shape]),
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0.0 if np.dtype(self.dtype).kind == "f" else 0,
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [*lead, self.chunk_rows, *self.row_shape],
                        "codecs": self._inner_codecs(),
                        "index_codecs": [_bytes_codec(8), {"name": "crc32c"}],
                        "index_location": "end",
                    },
                }
            ],
            "dimension_names": names,
            "attributes": {},
        }

    def _inner_codecs(self) -> list[dict[str, Json]]:
        codecs: list[dict[str, Json]] = []
        if self.transpose:
            axes = list(range(self.row_axis + 1 + len(self.row_shape)))
            order = [*axes[: self.row_axis], *axes[self.row_axis + 1 :], self.row_axis]
            codecs.append({"name": "transpose", "configuration": {"order": order}})
        codecs.append(_bytes_codec(np.dtype(self.dtype).itemsize))
        if self.level is None:
            return [*codecs, {"name": "crc32c"}]
        return [*codecs, {"name": "zstd", "configuration": {"level": self.level, "checksum": True}}]

    def metadata_bytes(self) -> bytes:
        return canonical(self.metadata())


def _regular(shape: list[int]) -> dict[str, Json]:
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


def _bytes_codec(itemsize: int) -> dict[str, Json]:
    return {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}


# -- the journal ------------------------------------------------------------------------------------------------------

JOURNAL = "_redistill"
BLOCKS = f"{JOURNAL}/blocks"
MANIFEST = f"{JOURNAL}/manifest.json"
SIGNATURE = f"{MANIFEST}.sig"  # of the manifest, by its author; never read with an archive
COPY_NAME = "copy.json"
COPY = f"{JOURNAL}/{COPY_NAME}"  # of a copy that holds some views only
NOTES = f"{JOURNAL}/notes"
QUARANTINE = f"{JOURNAL}/quarantine"
OLD_MANIFEST = f"{QUARANTINE}/manifest.json"  # of an archive that was unsealed to rewrite damaged blocks


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

CANARY_SHAPE = (8, 8, 3)

Teachers = Mapping[str, TeacherSpec]
NO_FEWER: Mapping[str, int] = MappingProxyType({})  # every teacher has all views


def _whole(path: str, dtype: str, shape: tuple[int, ...], level: int | None = 3) -> ArrayLayout:
    """An array without views, in one shard of chunks of about a mebibyte."""
    row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
    chunk_rows = max(1, min(shape[0], CHUNK_BYTES // row_bytes))
    shard_rows = -(-shape[0] // chunk_rows) * chunk_rows
    return ArrayLayout(path, dtype, shape, 0, shard_rows, chunk_rows, level=level)


def sample_arrays(spec: ArchiveSpec, key_bytes: int) -> dict[str, ArrayLayout]:
    """Keys, digests, labels and sizes; `key_bytes` is the total length of the keys, which is not in the specification.

    Digests do not compress and are stored uncompressed, so that the size of their file bounds the number of samples.
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
    assert array.chunk_rows is not None, "the specification must be resolved first"
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


def side_arrays(teacher: TeacherSpec) -> dict[str, ArrayLayout]:
    """Side data of all signals of a teacher, by "<signal>/<array>"."""
    return {
        f"{signal.name}/{side.name}": _whole(f"{_side_folder(teacher, signal)}/{side.name}", side.dtype, side.shape)
        for signal in teacher.signals
        for side in signal.side
    }


def part_arrays(spec: ArchiveSpec, teachers: Teachers, part: str) -> dict[str, ArrayLayout]:
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


# -- zarr.json files --------------------------------------------------------------------------------------------------


def _group(attributes: dict[str, Json]) -> bytes:
    return canonical({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def root_metadata(spec: ArchiveSpec) -> bytes:
    return root_metadata_of(spec.to_json())


def root_metadata_of(value: Mapping[str, Json]) -> bytes:
    """The root zarr.json of a specification as stored, which may have members of a newer minor version."""
    return _group({"redistill": value})


def teacher_path(name: str) -> str:
    return f"teachers/{name}/zarr.json"


def teacher_metadata(teacher: TeacherSpec) -> bytes:
    return _group({"redistill_teacher": teacher.to_json()})


def expected_metadata(spec: ArchiveSpec, teachers: Teachers) -> dict[str, bytes]:
    """Path and bytes of every zarr.json except those of the root, of the teachers and of samples/key_bytes."""
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


def count_files(spec: ArchiveSpec, teachers: Teachers, views: int) -> int:
    """An upper bound of the number of files of an archive, computed before any list of them is built."""
    per_row_block = len(spec.view_arrays) + bool(spec.view_arrays)
    per_row_block += sum(1 + sum(len(s.arrays) for s in teacher.signals) for teacher in teachers.values())
    signals = [signal for teacher in teachers.values() for signal in teacher.signals]
    constant = 32 + 4 * len(teachers) + sum(2 + len(s.arrays) + 2 * len(s.side) for s in signals)
    return constant + views * (spec.blocks_per_view * per_row_block + 3)


def check_extent(spec: ArchiveSpec, teachers: Teachers) -> None:
    """`UsageError` for too many files or too many arrays."""
    files = count_files(spec, teachers, spec.num_views)
    if files > limits.MAX_FILES:
        raise UsageError(
            f"{spec.num_views} views in blocks of {spec.block_rows} rows need {files} files, more than the "
            f"limit of {limits.MAX_FILES}; choose more rows per block"
        )
    arrays = sum(len(s.arrays) + len(s.side) for teacher in teachers.values() for s in teacher.signals)
    if arrays > limits.MAX_ARRAYS_IN_ALL:
        raise UsageError(
            f"{len(teachers)} teachers with {arrays} arrays, more than the limit of {limits.MAX_ARRAYS_IN_ALL}; "
            "use another archive for some of them"
        )


# -- blocks and their files -------------------------------------------------------------------------------------------


def samples_block(spec: ArchiveSpec) -> Block:
    return Block("samples", 0, 0, 0, spec.num_samples)


def side_block(teacher: str) -> Block:
    return Block(f"teachers/{teacher}/side", 0, 0, 0, 0)


def row_block(spec: ArchiveSpec, part: str, view: int, index: int) -> Block:
    start = index * spec.block_rows
    return Block(part, view, index, start, min(start + spec.block_rows, spec.num_samples))


def parts(spec: ArchiveSpec, teachers: Teachers) -> list[str]:
    """The parts that are written in blocks of rows or of canaries."""
    names = ["views"] if spec.view_arrays else []
    names += ["canaries"] if spec.canaries_per_view else []
    return names + [f"teachers/{name}" for name in sorted(teachers)]


def part_blocks(spec: ArchiveSpec, part: str, views: int) -> Iterator[Block]:
    """All blocks of a part for views [0, views), view-major: any prefix of views is a prefix of the blocks."""
    for view in range(views):
        if part == "canaries":
            yield Block(part, view, 0, 0, spec.canaries_per_view)
            continue
        for index in range(spec.blocks_per_view):
            yield row_block(spec, part, view, index)


def all_blocks(
    spec: ArchiveSpec, teachers: Teachers, views: int, teacher_views: Mapping[str, int] = NO_FEWER
) -> Iterator[tuple[Block, list[str]]]:
    """Every block of a complete archive, with its files other than its record: the shards of its arrays.

    `teacher_views` has the number of views of the teachers with fewer than `views`.
    """
    samples = sample_arrays(spec, 1)
    # The zarr.json of the keys depends on their length, so it is a file of the block.
    yield samples_block(spec), [*_shards(samples), samples["key_bytes"].metadata_path]
    for teacher in teachers.values():
        yield side_block(teacher.name), _shards(side_arrays(teacher))
    for part in parts(spec, teachers):
        arrays = part_arrays(spec, teachers, part)
        for block in part_blocks(spec, part, _views_of(part, views, teacher_views)):
            yield block, _shards(arrays, block.view, block.index)


def _views_of(part: str, views: int, teacher_views: Mapping[str, int]) -> int:
    return teacher_views.get(part.removeprefix("teachers/"), views) if part.startswith("teachers/") else views


def _shards(arrays: Mapping[str, ArrayLayout], view: int = 0, index: int = 0) -> list[str]:
    return [array.shard_path(view, index) for array in arrays.values()]


OF_A_VIEW = re.compile(
    r"_redistill/blocks/(?:views|canaries|teachers\.([^./]+))\.(\d{1,9})\.\d+\.json"
    r"|(?:views|canaries|teachers/([^/]+)/[^/]+)/[^/]+/c\.(\d{1,9})\.[^/]*"
)


def view_of_file(name: str) -> int | None:
    """The view that a file of an archive is of; None if it is of the archive as a whole. The path tells."""
    match = OF_A_VIEW.fullmatch(name)
    return None if match is None else int(match[2] or match[4])


def teacher_of_file(name: str) -> str | None:
    """The teacher whose rows of a view are in a file; None where it is of something else."""
    match = OF_A_VIEW.fullmatch(name)
    return None if match is None else match[1] or match[3]


def expected_files(
    spec: ArchiveSpec, teachers: Teachers, views: int, teacher_views: Mapping[str, int] = NO_FEWER
) -> set[str]:
    """Every file of a sealed archive except its manifest."""
    names = {"zarr.json", *(teacher_path(name) for name in teachers)}
    names.update(expected_metadata(spec, teachers))
    for block, files in all_blocks(spec, teachers, views, teacher_views):
        names.add(block.record_path)
        names.update(files)
    return names
