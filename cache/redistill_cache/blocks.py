"""Which blocks an archive has, and which files each of them: from the specification alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from redistill_cache import layout
from redistill_cache.layout import ArrayLayout, Block
from redistill_cache.spec import ArchiveSpec, TeacherSpec

__all__ = ["all_blocks", "expected_files", "part_blocks", "parts", "samples_block", "side_block"]

Teachers = Mapping[str, TeacherSpec]


def samples_block(spec: ArchiveSpec) -> Block:
    return Block("samples", 0, 0, 0, spec.num_samples)


def side_block(teacher: TeacherSpec) -> Block:
    return Block(f"teachers/{teacher.name}/side", 0, 0, 0, 0)


def parts(spec: ArchiveSpec, teachers: Teachers) -> list[str]:
    """The parts that are written in blocks of rows or of canaries."""
    found = ["views"] if spec.view_arrays else []
    found += ["canaries"] if spec.canaries_per_view else []
    return found + [f"teachers/{name}" for name in sorted(teachers)]


def part_blocks(spec: ArchiveSpec, part: str, views: int) -> Iterator[Block]:
    """All blocks of a part for views [0, views), view-major: any prefix of views is a prefix of the blocks."""
    for view in range(views):
        if part == "canaries":
            yield Block(part, view, 0, 0, spec.canaries_per_view)
            continue
        for index in range(spec.blocks_per_view):
            start = index * spec.block_rows
            yield Block(part, view, index, start, min(start + spec.block_rows, spec.num_samples))


def all_blocks(spec: ArchiveSpec, teachers: Teachers, views: int) -> Iterator[tuple[Block, list[str]]]:
    """Every block that a complete archive has, and its files besides its record: the shards of its arrays."""
    samples = layout.sample_arrays(spec, 1)
    # And the one zarr.json that depends on what is written, not on the specification alone.
    yield samples_block(spec), [*_shards(samples), samples["key_bytes"].metadata_path]
    for teacher in teachers.values():
        yield side_block(teacher), _shards(layout.side_arrays(teacher))
    for part in parts(spec, teachers):
        arrays = layout.part_arrays(spec, dict(teachers), part)
        for block in part_blocks(spec, part, views):
            yield block, _shards(arrays, block.view, block.index)


def _shards(arrays: Mapping[str, ArrayLayout], view: int = 0, index: int = 0) -> list[str]:
    return [array.shard_path(view, index) for array in arrays.values()]


def expected_files(spec: ArchiveSpec, teachers: Teachers, views: int) -> set[str]:
    """Every file that a sealed archive has besides its manifest, and no other."""
    names = {"zarr.json", *(layout.teacher_path(name) for name in teachers)}
    names.update(layout.expected_metadata(spec, dict(teachers)))
    for block, files in all_blocks(spec, teachers, views):
        names.add(block.record_path)
        names.update(files)
    return names
