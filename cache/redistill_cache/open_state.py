"""What an archive really holds: which blocks are committed, and the size and hash of every file that belongs to it.

A sealed archive says so in its manifest; the manifest is held against what the specification demands, so a file that
is missing from it, or one too many, is found without looking at the disk. An unsealed one is the sum of its records.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from redistill_cache import layout, limits
from redistill_cache.commits import Commits
from redistill_cache.errors import Damaged, Incomplete, Refused, UsageError
from redistill_cache.journal import FileEntry, Record, parse_files, parse_header, sha256
from redistill_cache.layout import Block, all_blocks, expected_files
from redistill_cache.spec import ArchiveSpec, TeacherSpec
from redistill_cache.spec_files import Document, list_teachers, read_root, read_teachers
from redistill_cache.storage import LOCAL, MOST_FILES, open_regular, read_small, walk_regular
from redistill_cache.strict_json import Json
from redistill_cache.verified_files import WHOLE, VerifiedFiles
from redistill_cache.wording import human_bytes

__all__ = [
    "ArchiveState",
    "check_digests_size",
    "check_keys_size",
    "check_metadata_on_disk",
    "check_side_size",
    "check_sizes_on_disk",
    "read_committed",
    "read_state",
    "require_memory",
]


# -- claims -----------------------------------------------------------------------------------------------------------
#
# What an archive claims, held against the bytes that are really there: kilobytes must not become gigabytes.
#
# Writers keep the same bounds (`UsageError`), so no honest archive meets them in a reader.

SizeOf = Callable[[str], int]  # of a file of the archive


def check_digests_size(spec: ArchiveSpec, size_of: SizeOf) -> None:
    """Digests are stored as they are, so the number of samples is no larger than what their file can hold."""
    digests = layout.sample_arrays(spec, 1)["digest"]
    found = size_of(digests.shard_path(0, 0))
    if found != digests.stored_bytes:
        raise UsageError(
            f"the digests of {spec.num_samples} samples take {digests.stored_bytes} bytes, found {found}; "
            "the number of samples is wrong"
        )


def check_keys_size(spec: ArchiveSpec, total: int, stored: int) -> None:
    """`total` bytes of keys that lie in `stored` bytes."""
    most = min(spec.num_samples * limits.MAX_KEY_BYTES, limits.KEY_SLACK + limits.KEY_RATIO * stored)
    if not 1 <= total <= most:
        raise UsageError(
            f"keys of {spec.num_samples} samples, stored in {stored} bytes, may take 1 to {most} bytes, found {total}"
        )


def check_side_size(teacher: TeacherSpec, size_of: SizeOf) -> None:
    """The side data of every signal, given the sizes of its files."""
    shards = {name: array.shard_path(0, 0) for name, array in layout.side_arrays(teacher).items()}
    for signal in teacher.signals:
        total = sum(side.nbytes for side in signal.side)
        stored = sum(size_of(shards[f"{signal.name}/{side.name}"]) for side in signal.side)
        most = limits.SIDE_SLACK + limits.SIDE_RATIO * stored
        if total > most:
            raise UsageError(
                f"side data of signal {signal.name!r}, stored in {stored} bytes, may take {most} bytes, found {total}"
            )


def require_memory(nbytes: int, what: str) -> None:
    """`Refused` when something takes more memory than the machine has: said now, not by the kernel later."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if nbytes > have:
        raise Refused(f"{what} takes {human_bytes(nbytes)} of memory, this machine has {human_bytes(have)}")


# -- contents ---------------------------------------------------------------------------------------------------------

LIST_THEM = "'redistill verify' lists everything that is damaged"
STRANGERS = 10_000  # leftovers, notes, quarantine: files that nobody minds besides those of the manifest


@dataclass(frozen=True)
class ArchiveState:
    """The committed content of an archive, checked against its specification."""

    path: Path
    spec: ArchiveSpec
    id: str | None  # None: not sealed
    num_views: int
    teachers: Mapping[str, TeacherSpec]
    stats: Mapping[str, Mapping[str, Json]]  # per teacher and signal, merged over blocks; of a sealed archive
    files: Mapping[str, FileEntry] = field(repr=False)
    committed: frozenset[tuple[str, int, int]] | None = field(repr=False)  # None: everything
    stamps: VerifiedFiles = field(repr=False)

    def holds(self, block: Block) -> bool:
        return self.committed is None or (block.part, block.view, block.index) in self.committed


def read_state(path: Path, *, allow_partial: bool) -> ArchiveState:
    """Read specification and journal of the archive at `path`; `Incomplete` when it is not sealed and must be.

    Nothing is known of its other files then but what they must be.
    """
    root = read_root(path)
    if (path / layout.JOURNAL).is_symlink():
        raise Refused(f"{path / layout.JOURNAL} is a symbolic link; archives hold folders and regular files only")
    try:
        data = read_small(path / layout.MANIFEST, limits.MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        if not allow_partial:
            raise Incomplete(
                f"{path} is not finished: it was never sealed; run the command that wrote it again, "
                "or open it with allow_partial=True for the blocks it has"
            ) from None
        return _partial(path, root, Commits(path, LOCAL), settle=False)
    return _sealed(path, root, data)


def read_committed(path: Path, commits: Commits) -> ArchiveState:
    """What is committed by now, for its writer: also of a teacher that is being added to a sealed archive."""
    return _partial(path, read_root(path), commits, settle=True)


# -- sealed -----------------------------------------------------------------------------------------------------------


def _sealed(path: Path, root: Document[ArchiveSpec], data: bytes) -> ArchiveState:
    where = str(path / layout.MANIFEST)
    header = parse_header(data, where)
    if header.identity != root.identity or header.views > root.spec.num_views:
        raise Damaged(f"{path}: manifest and zarr.json are not of the same archive; restore both from one copy")
    identity = sha256(data)
    stamps = VerifiedFiles(path, identity)
    if not stamps.verified(WHOLE, FileEntry(0, identity), 0):
        walk_regular(path, most=2 * data.count(b"\n") + STRANGERS)  # no links anywhere, not even as folders
    documents = read_teachers(path, header.teachers, root)
    teachers = {name: item.spec for name, item in documents.items()}
    most = layout.count_files(root.spec, teachers, header.views)
    contents = ArchiveState(
        path=path,
        spec=root.spec,
        id=identity,
        num_views=header.views,
        teachers=teachers,
        stats=header.teachers,
        files=parse_files(data, header, where, most=most),
        committed=None,
        stamps=stamps,
    )
    _check_list(contents)
    _check_metadata(contents, root, documents)
    _check_claims(contents)
    return contents


def _check_list(contents: ArchiveState) -> None:
    """The manifest must name every file that the specification demands, and no other."""
    expected = expected_files(contents.spec, contents.teachers, contents.num_views)
    if expected != contents.files.keys():
        odd = min(expected ^ contents.files.keys())
        lacks = "lacks" if odd in expected else "names"
        raise Damaged(
            f"{contents.path}: the manifest {lacks} {odd}, which does not fit its specification; it was edited"
        )


def _check_metadata(
    contents: ArchiveState, root: Document[ArchiveSpec], teachers: Mapping[str, Document[TeacherSpec]]
) -> None:
    """The manifest must have the hash of every zarr.json that the specification makes: nobody interprets one then."""
    parsed = {"zarr.json": root.data} | {layout.teacher_path(name): teachers[name].data for name in contents.teachers}
    made = layout.expected_metadata(contents.spec, dict(contents.teachers))
    for name, data in (parsed | made).items():
        if contents.files[name] != FileEntry(len(data), sha256(data)):
            raise Damaged(f"{contents.path}: the manifest has another hash for {name} than its specification makes")


def _check_claims(contents: ArchiveState) -> None:
    """What will be allocated for the sample index and for side data, against the bytes there are."""

    def size_of(name: str) -> int:
        return contents.files[name].size

    try:
        check_digests_size(contents.spec, size_of)
        for teacher in contents.teachers.values():
            check_side_size(teacher, size_of)
    except UsageError as error:
        raise Damaged(f"{contents.path}: {error}") from None


# -- not sealed -------------------------------------------------------------------------------------------------------


def _partial(path: Path, root: Document[ArchiveSpec], commits: Commits, *, settle: bool) -> ArchiveState:
    """The blocks that are committed and in place. One that its writer has not settled yet, or died before, is settled
    by other writers in passing; readers change nothing and leave it out."""
    walk_regular(path, most=MOST_FILES)
    is_there = commits.settle if settle else commits.in_place
    present = commits.names() if (path / layout.BLOCKS).is_dir() else set()
    documents = read_teachers(path, list_teachers(path), root)
    teachers = {name: item.spec for name, item in documents.items()}
    records: list[Record] = []
    for block, files in all_blocks(root.spec, teachers, root.spec.num_views):
        if block.record_path not in present:
            continue
        identity = documents[block.part.split("/")[1]].identity if block.part.startswith("teachers/") else root.identity
        record = commits.load(block, identity, files)
        if is_there(record):
            records.append(record)
    committed = frozenset((r.block.part, r.block.view, r.block.index) for r in records)
    if ("samples", 0, 0) not in committed:
        raise Incomplete(f"{path}: not even its sample index is written; run the command that wrote it again")
    contents = ArchiveState(
        path=path,
        spec=root.spec,
        id=None,
        num_views=root.spec.num_views,
        teachers={name: t for name, t in teachers.items() if (f"teachers/{name}/side", 0, 0) in committed},
        stats={},
        files={name: entry for record in records for name, entry in record.files.items()},
        committed=committed,
        stamps=VerifiedFiles(path, root.identity),
    )
    _check_claims(contents)
    return contents


# -- what lies on the disk --------------------------------------------------------------------------------------------


def check_metadata_on_disk(contents: ArchiveState) -> None:
    """Every zarr.json is, byte for byte, what the specification makes."""
    for name, data in layout.expected_metadata(contents.spec, dict(contents.teachers)).items():
        file = contents.path / name
        try:
            found = read_small(file, limits.MAX_METADATA_BYTES)
        except FileNotFoundError:
            raise Damaged(f"{file} is missing; {LIST_THEM}") from None
        if found != data:
            raise Damaged(f"{file} is not what the specification makes; it was edited or damaged; {LIST_THEM}")


def check_sizes_on_disk(contents: ArchiveState) -> None:
    """Every file is there, regular, of the right size: looked at once per machine and manifest. Reads look again."""
    if contents.id is None or contents.stamps.verified(WHOLE, FileEntry(0, contents.id), 0):
        return
    for name, entry in contents.files.items():
        problem = _file_problem(contents.path / name, entry)
        if problem:
            raise Damaged(f"{contents.path / name} {problem}; {LIST_THEM}")
    contents.stamps.remember([(WHOLE, FileEntry(0, contents.id), 0)])


def _file_problem(path: Path, entry: FileEntry) -> str | None:
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
