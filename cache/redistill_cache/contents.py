"""What an archive really holds: which blocks are committed, and the size and hash of every file that belongs to it.

A sealed archive says so in its manifest; the manifest is held against what the specification demands, so a file that
is missing from it, or one too many, is found without looking at the disk. An unsealed one is the sum of its records.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from redistill_cache import layout, limits
from redistill_cache.archive_files import list_teachers, read_root, read_teacher
from redistill_cache.commits import Commits
from redistill_cache.errors import Damaged, Incomplete
from redistill_cache.files import LOCAL
from redistill_cache.journal import FileEntry, Manifest, Record, parse_manifest, sha256
from redistill_cache.layout import Block
from redistill_cache.spec import ArchiveSpec, TeacherSpec, teacher_identity
from redistill_cache.stamps import WHOLE, Stamps
from redistill_cache.storage import MOST_FILES, open_regular, read_small, walk_regular
from redistill_cache.strict_json import Json

__all__ = ["Contents", "read_committed", "read_contents"]


@dataclass(frozen=True)
class Contents:
    """The committed content of an archive, checked against its specification."""

    path: Path
    spec: ArchiveSpec
    id: str | None  # None: not sealed
    num_views: int
    teachers: Mapping[str, TeacherSpec]
    stats: Mapping[str, Mapping[str, Json]]  # per teacher and signal, merged over blocks; of a sealed archive
    files: Mapping[str, FileEntry] = field(repr=False)
    committed: frozenset[tuple[str, int, int]] | None = field(repr=False)  # None: everything
    stamps: Stamps = field(repr=False)

    def holds(self, block: Block) -> bool:
        return self.committed is None or (block.part, block.view, block.index) in self.committed


def read_contents(path: Path, *, allow_partial: bool) -> Contents:
    """Read specification and journal of the archive at `path`; `Incomplete` when it is not sealed and must be."""
    spec, identity = read_root(path)
    try:
        data = read_small(path / layout.MANIFEST, limits.MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        if not allow_partial:
            raise Incomplete(
                f"{path} is not finished: it was never sealed; run the command that wrote it again, "
                "or open it with allow_partial=True for the blocks it has"
            ) from None
        return _partial(path, spec, identity)
    return _sealed(path, spec, identity, data)


def read_committed(path: Path) -> Contents:
    """What is committed by now, sealed or not: also of a teacher that is being added to a sealed archive."""
    spec, identity = read_root(path)
    return _partial(path, spec, identity)


# -- sealed -----------------------------------------------------------------------------------------------------------


def _sealed(path: Path, spec: ArchiveSpec, identity: str, data: bytes) -> Contents:
    manifest = parse_manifest(data, str(path / layout.MANIFEST))
    if manifest.identity != identity or manifest.views > spec.num_views:
        raise Damaged(f"{path}: manifest and zarr.json are not of the same archive; restore both from one copy")
    teachers = {name: read_teacher(path, name, spec, identity)[0] for name in sorted(manifest.teachers)}
    _check_list(path, spec, manifest, teachers)
    _check_metadata(path, _metadata(spec, teachers), manifest.files)
    contents = Contents(
        path=path,
        spec=spec,
        id=sha256(data),
        num_views=manifest.views,
        teachers=teachers,
        stats=manifest.teachers,
        files=manifest.files,
        committed=None,
        stamps=Stamps(path, sha256(data)),
    )
    _check_sizes(contents)
    return contents


def all_blocks(spec: ArchiveSpec, teachers: Mapping[str, TeacherSpec], views: int) -> Iterator[Block]:
    """Every block that a complete archive has."""
    yield layout.samples_block(spec)
    parts = ["views"] if spec.view_arrays else []
    parts += ["canaries"] if spec.canaries_per_view else []
    for teacher in teachers.values():
        yield layout.side_block(teacher)
        parts.append(f"teachers/{teacher.name}")
    for part in parts:
        yield from layout.expected_blocks(spec, part, views)


def block_files(spec: ArchiveSpec, teachers: Mapping[str, TeacherSpec], block: Block) -> list[str]:
    """The shards of a block, and for the samples the one zarr.json that depends on them."""
    if block.part == "samples":
        arrays = layout.sample_arrays(spec, 1)
        return [*(a.shard_path(0, 0) for a in arrays.values()), arrays["key_bytes"].metadata_path]
    if block.part.endswith("/side"):
        side = layout.side_arrays(teachers[block.part.split("/")[1]])
        return [array.shard_path(0, 0) for array in side.values()]
    return [
        a.shard_path(block.view, block.index) for a in layout.part_arrays(spec, dict(teachers), block.part).values()
    ]


def _check_list(path: Path, spec: ArchiveSpec, manifest: Manifest, teachers: Mapping[str, TeacherSpec]) -> None:
    """The manifest must name every file that the specification demands, and no other."""
    expected = {"zarr.json", *(layout.teacher_path(name) for name in teachers)}
    expected.update(layout.expected_metadata(spec, dict(teachers)))
    per_part: dict[str, list[layout.ArrayLayout]] = {}
    for block in all_blocks(spec, teachers, manifest.views):
        expected.add(block.record_path)
        if block.part == "samples" or block.part.endswith("/side"):
            expected.update(block_files(spec, teachers, block))
            continue
        arrays = per_part.get(block.part)
        if arrays is None:
            arrays = per_part[block.part] = list(layout.part_arrays(spec, dict(teachers), block.part).values())
        expected.update([array.shard_path(block.view, block.index) for array in arrays])
    if expected != manifest.files.keys():
        odd = min(expected ^ manifest.files.keys())
        lacks = "lacks" if odd in expected else "names"
        raise Damaged(f"{path}: the manifest {lacks} {odd}, which does not fit its specification; it was edited")


def _metadata(spec: ArchiveSpec, teachers: Mapping[str, TeacherSpec]) -> dict[str, bytes]:
    expected = layout.expected_metadata(spec, dict(teachers))
    return expected | {layout.teacher_path(name): layout.teacher_metadata(t) for name, t in teachers.items()}


def _check_metadata(path: Path, expected: Mapping[str, bytes], files: Mapping[str, FileEntry]) -> None:
    """Every zarr.json must be, byte for byte, what the specification makes: nobody has to interpret it then."""
    for name, data in expected.items():
        entry = files.get(name)
        if entry is not None and entry != FileEntry(len(data), sha256(data)):
            raise Damaged(f"{path}: the manifest has another hash for {name} than its specification makes")
        try:
            found = read_small(path / name, limits.MAX_METADATA_BYTES)
        except FileNotFoundError:
            raise Damaged(f"{path / name} is missing; restore it, or fetch the archive again") from None
        if found != data:
            raise Damaged(f"{path / name} is not what the specification makes; it was edited or damaged")


def _check_sizes(contents: Contents) -> None:
    """Look at every file once per machine and manifest: there, regular, of the right size. Reads look again."""
    assert contents.id is not None
    whole = FileEntry(len(contents.files), contents.id)
    if contents.stamps.verified(WHOLE, whole, 0):
        return
    walk_regular(contents.path, most=MOST_FILES)  # no links anywhere, not even as folders
    for name, entry in contents.files.items():
        problem = file_problem(contents.path / name, entry)
        if problem:
            raise Damaged(f"{contents.path / name} {problem}; 'redistill verify' lists everything that is damaged")
    contents.stamps.remember([(WHOLE, whole, 0)])


def file_problem(path: Path, entry: FileEntry) -> str | None:
    """Why the file cannot be the one that was committed, from its inode alone."""
    try:
        fd = open_regular(path)
    except FileNotFoundError:
        return "is missing"
    try:
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    return None if size == entry.size else f"has {size} bytes, {entry.size} were committed"


# -- not sealed -------------------------------------------------------------------------------------------------------


def _partial(path: Path, spec: ArchiveSpec, identity: str) -> Contents:
    """The blocks that are committed and in place. What a dead writer left unsettled waits for the next writer."""
    walk_regular(path, most=MOST_FILES)
    commits = Commits(path, LOCAL)
    present = commits.names() if (path / layout.BLOCKS).is_dir() else set()
    teachers = {name: read_teacher(path, name, spec, identity)[0] for name in list_teachers(path)}
    records: list[Record] = []
    for block in all_blocks(spec, teachers, spec.num_views):
        if block.record_path not in present:
            continue
        teacher = teachers.get(block.part.split("/")[1]) if block.part.startswith("teachers/") else None
        bound = identity if teacher is None else teacher_identity(identity, teacher.to_json())
        record = commits.load(block, bound)
        if all(commits.in_place(name, entry) for name, entry in record.files.items()):
            records.append(record)
    committed = frozenset((r.block.part, r.block.view, r.block.index) for r in records)
    if ("samples", 0, 0) not in committed:
        raise Incomplete(f"{path}: not even its sample index is written; run the command that wrote it again")
    usable = {name: t for name, t in teachers.items() if (f"teachers/{name}/side", 0, 0) in committed}
    _check_metadata(path, _metadata(spec, usable), {})
    return Contents(
        path=path,
        spec=spec,
        id=None,
        num_views=spec.num_views,
        teachers=usable,
        stats={},
        files={name: entry for record in records for name, entry in record.files.items()},
        committed=committed,
        stamps=Stamps(path, identity),
    )
