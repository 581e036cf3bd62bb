"""Writing an archive: any number of processes, any number of crashes, the same bytes.

    writer = ArchiveWriter.create(path, spec)            # or .resume(path, spec) after a crash, or to add to it
    writer.write_samples(keys, labels, digests, sizes)
    writer.add_teacher(teacher, side={"logits": codec.side()})
    for block in writer.missing("teachers/resnet50"):
        writer.write(block, arrays, stats)               # arrays: {"logits/q": int8 [n, 64], ...}
    archive_id = writer.seal()

Every call is durable when it returns. How a block is committed, and why two writers cannot mix, is in commits.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from redistill_cache import claims, layout, limits
from redistill_cache.archive_files import list_teachers, read_root, read_teachers
from redistill_cache.blocks import all_blocks, part_blocks, parts, samples_block, side_block
from redistill_cache.commits import Commits
from redistill_cache.contents import read_committed
from redistill_cache.errors import Incomplete, OutOfRange, Refused, SpecMismatch, UsageError
from redistill_cache.files import LOCAL, Files, is_leftover
from redistill_cache.journal import FileEntry, Record, sha256
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.layout import ArrayLayout, Block
from redistill_cache.preconditions import (
    check_array,
    check_keys,
    check_names,
    check_record,
    refuse_difference,
)
from redistill_cache.reader import Archive
from redistill_cache.sealing import check_manifest, make_manifest
from redistill_cache.shards import encode_shard
from redistill_cache.spec import ArchiveSpec, TeacherSpec, archive_identity, teacher_identity
from redistill_cache.storage import MOST_FILES, disk_trouble, read_small, walk_regular
from redistill_cache.strict_json import Json, canonical
from redistill_cache.tree import Tree

__all__ = ["ArchiveWriter"]

RERUN = "; then run the same command again: committed blocks are kept"
# Recorded or growing, so free to differ when an archive is resumed.
NOT_COMPARED = ("environment",)
NOTE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,100}")


class ArchiveWriter:
    """Writes one archive. Threads may share a writer; processes each make their own."""

    def __init__(self, path: Path, spec: ArchiveSpec, files: Files) -> None:
        """Use `create`, `resume` or `extend_views`."""
        self.path = path
        self.spec = spec
        self.teachers: dict[str, TeacherSpec] = {}
        self._files = files
        self._commits = Commits(path, files)
        self._tree = Tree(path, files)
        self._identity = archive_identity(spec.to_json())

    # -- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, spec: ArchiveSpec, *, files: Files = LOCAL) -> ArchiveWriter:
        """Start a new archive. Refused when anything but an empty folder is at `path`."""
        path = Path(path).absolute()
        spec = spec.resolved()
        layout.check_extent(spec, {})
        with disk_trouble("create", path):
            if path.is_symlink() or (path.exists() and (not path.is_dir() or _holds_files(path))):
                raise Refused(f"{path} exists already; resume it, remove it, or choose another path")
            files.make_directories(path)
            try:
                # First, and exclusively: of two creators one wins, and all other metadata follows from this file.
                files.publish(path / "zarr.json", layout.root_metadata(spec), exclusive=True)
            except FileExistsError:
                raise Refused(f"{path}: another process has just created this archive; resume it") from None
            writer = cls(path, spec, files)
            writer._tree.write_metadata(writer.spec, writer.teachers)
        return writer

    @classmethod
    def resume(cls, path: str | Path, spec: ArchiveSpec | None = None, *, files: Files = LOCAL) -> ArchiveWriter:
        """Continue an archive, sealed or not. `SpecMismatch` names the field in which `spec` differs from it."""
        path = Path(path).absolute()
        with disk_trouble("resume", path):
            root = read_root(path)
            if spec is not None:
                refuse_difference(root.spec.to_json(), spec.resolved().to_json(), str(path), NOT_COMPARED)
            walk_regular(path, most=MOST_FILES)  # never write through a link
            writer = cls(path, root.spec, files)
            documents = read_teachers(path, list_teachers(path), root)
            root.require_writable(path)
            for document in documents.values():
                document.require_writable(path)
            writer.teachers = {name: document.spec for name, document in documents.items()}
            writer._tree.write_metadata(writer.spec, writer.teachers)
            writer._recover()
        return writer

    @classmethod
    def extend_views(cls, path: str | Path, num_views: int, *, files: Files = LOCAL) -> ArchiveWriter:
        """Raise the number of views of an archive. It is unsealed first and stays so until `seal`; nothing is redone.

        Safe to repeat after a crash at any point. The id changes with the next seal.
        """
        path = Path(path).absolute()
        with disk_trouble("extend", path):
            root = read_root(path)
            root.require_writable(path)
            stored = root.spec
            if num_views < stored.num_views:
                raise Refused(f"{path} has {stored.num_views} views; it cannot shrink to {num_views}")
            if num_views > stored.num_views:
                spec = replace(stored, num_views=num_views)
                layout.check_extent(spec, {})
                manifest = path / layout.MANIFEST
                if manifest.exists():
                    files.remove(manifest)
                    files.sync_directory(manifest.parent)
                files.publish(path / "zarr.json", layout.root_metadata(spec))
        return cls.resume(path, files=files)

    def _recover(self) -> None:
        """Finish what dead writers left: settle their commits, and forget blocks whose files are gone or cut short."""
        present = self._commits.names()
        for block, names in self._all_blocks(self.spec.num_views):
            if block.record_path in present and not self._commits.settle(self._load(block, names)):
                self._commits.forget(block)
        self._tree.sync_folders(self.spec, self.teachers)

    # -- what is there ------------------------------------------------------------------------------------------------

    def parts(self) -> list[str]:
        """The parts that are written in blocks."""
        return parts(self.spec, self.teachers)

    def missing(self, part: str) -> list[Block]:
        """The blocks of a part that nobody has committed yet, view by view."""
        if not self._arrays_of(part):
            return []
        with disk_trouble("read", self.path):
            present = self._commits.names()
        blocks = part_blocks(self.spec, part, self.spec.num_views)
        return [block for block in blocks if block.record_path not in present]

    def read_back(self) -> Archive:
        """An archive of exactly what is committed by now: to test what was written, or to go on with its codecs.

        Blocks that another process is just committing are part of it: they are settled here.
        """
        with disk_trouble("read", self.path):
            return Archive(read_committed(self.path, self._commits))

    @property
    def sealed(self) -> bool:
        return (self.path / layout.MANIFEST).exists()

    def _arrays_of(self, part: str) -> dict[str, ArrayLayout]:
        return layout.part_arrays(self.spec, self.teachers, part)

    def _identity_of(self, block: Block) -> str:
        if not block.part.startswith("teachers/"):
            return self._identity
        teacher = self.teachers[block.part.split("/")[1]]
        return teacher_identity(self._identity, teacher.to_json())

    def _load(self, block: Block, files: Collection[str]) -> Record:
        return self._commits.load(block, self._identity_of(block), files)

    def _all_blocks(self, views: int) -> Iterator[tuple[Block, list[str]]]:
        return all_blocks(self.spec, self.teachers, views)

    # -- writing ------------------------------------------------------------------------------------------------------

    def write_samples(
        self, keys: Sequence[str] | PackedKeys, labels: np.ndarray, digests: np.ndarray, sizes: np.ndarray
    ) -> None:
        """The sample index, once. Writing the same again does nothing; writing another is a `SpecMismatch`.

        digests [N, 32] are SHA-256 of the encoded samples, sizes [N, 2] (height, width) of the decoded images.
        """
        packed = pack_keys(keys)
        arrays = {
            "key_bytes": packed.data,
            "key_offsets": packed.offsets,
            "digest": np.asarray(digests),
            "label": np.asarray(labels),
            "size": np.asarray(sizes),
        }
        check_keys(packed)
        layouts = layout.sample_arrays(self.spec, len(packed.data))
        for name, array in layouts.items():
            check_array(name, arrays[name], array, array.shape[0])
        low, high = int(arrays["label"].min()), int(arrays["label"].max())
        if low < -1 or high >= self.spec.num_classes:
            raise UsageError(f"labels must be from 0 to {self.spec.num_classes - 1} (or -1), found {low} to {high}")
        data = _encode(layouts, arrays)
        claims.check_keys(self.spec, len(packed.data), len(data[layouts["key_bytes"].shard_path(0, 0)]))
        data[layouts["key_bytes"].metadata_path] = layouts["key_bytes"].metadata_bytes()
        self._write_once(samples_block(self.spec), data, "the sample index")

    def add_teacher(
        self, teacher: TeacherSpec, side: Mapping[str, Mapping[str, np.ndarray]] | None = None
    ) -> TeacherSpec:
        """Declare a teacher and write its side data: {signal: {name: array}}. No existing file is touched.

        Repeating it with the same specification and side data does nothing; other ones are a `SpecMismatch`.
        """
        teacher = teacher.resolved(self.spec.block_rows)
        self.spec.check_teacher(teacher)
        layout.check_extent(self.spec, self.teachers | {teacher.name: teacher})
        layouts = layout.side_arrays(teacher)
        arrays = {
            f"{signal}/{name}": np.asarray(a) for signal, named in (side or {}).items() for name, a in named.items()
        }
        check_names(arrays, layouts, f"side data of teacher {teacher.name!r}")
        for name, array in layouts.items():
            check_array(name, arrays[name], array, array.shape[0])
        data = _encode(layouts, arrays)
        claims.check_side(teacher, lambda path: len(data[path]))
        path = self.path / layout.teacher_path(teacher.name)
        with disk_trouble("write", path, RERUN):
            self._files.make_directories(path.parent)
            if not path.exists():
                self._publish_first(path, layout.teacher_metadata(teacher))
            stored = read_teachers(self.path, [teacher.name], read_root(self.path))[teacher.name].spec
            refuse_difference(stored.to_json(), teacher.to_json(), f"{self.path}: teacher {teacher.name!r}", ())
            self.teachers[teacher.name] = stored
            self._tree.write_metadata(self.spec, self.teachers)
        self._write_once(side_block(teacher), data, f"side data of teacher {teacher.name!r}")
        return teacher

    def _publish_first(self, path: Path, data: bytes) -> None:
        try:
            self._files.publish(path, data, exclusive=True)
        except FileExistsError:
            return  # another process was first; the caller compares

    def _write_once(self, block: Block, data: Mapping[str, bytes], what: str) -> None:
        """Commit a block that there is one of; if it is there already it must be the same."""
        with disk_trouble("write", self.path, RERUN):
            mine = {path: FileEntry(len(content), sha256(content)) for path, content in data.items()}
            if block.record_path not in self._commits.names():
                for path, content in data.items():
                    self._commits.stage(path, content)
                if self._commits.commit(Record(block, self._identity_of(block), mine)):
                    return
            differing = sorted(path for path, entry in self._load(block, mine).files.items() if mine.get(path) != entry)
        if differing:
            raise SpecMismatch(
                f"{self.path}: {what} was written before and differs now (in {differing[0]}); "
                "the data or the library that made it changed: use what it was made with, or start a new archive"
            )

    def write(self, block: Block, arrays: Mapping[str, np.ndarray], stats: Mapping[str, Json] | None = None) -> bool:
        """Commit one block. False when another writer committed it first; what is stored is then theirs.

        `arrays` has every array of the part: "crop" for views, "row" and "pixels" for canaries, "<signal>/<array>" for
        a teacher, each [rows of the block, ...]. `stats`, per signal, goes into the commit record.
        """
        layouts = self._arrays_of(block.part)
        self._check_block(block)
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        check_names(arrays, layouts, str(block))
        for name, array in layouts.items():
            check_array(name, arrays[name], array, block.stop - block.start)
        with disk_trouble("write", self.path, RERUN):
            if (self.path / block.record_path).exists():
                return False
            try:
                files = {}
                for name, array in layouts.items():  # one at a time: a block of one array is all the memory it takes
                    path = array.shard_path(block.view, block.index)
                    files[path] = self._commits.stage(path, encode_shard(array, arrays[name]))
                record = Record(block, self._identity_of(block), files, stats)
                check_record(record)
                return self._commits.commit(record)
            except FileNotFoundError:
                # `seal` sweeps what was staged for blocks that are committed: then somebody else was faster.
                if (self.path / block.record_path).exists():
                    return False
                raise

    def _check_block(self, block: Block) -> None:
        per_view = 1 if block.part == "canaries" else self.spec.blocks_per_view
        if not (0 <= block.view < self.spec.num_views and 0 <= block.index < per_view):
            raise OutOfRange(f"{block}: the archive has {self.spec.num_views} views of {per_view} blocks")
        expected = next(b for b in part_blocks(self.spec, block.part, 1) if b.index == block.index)
        if (block.start, block.stop) != (expected.start, expected.stop):
            raise UsageError(f"{block} has rows {expected.start} to {expected.stop}; take blocks from missing()")

    def note(self, name: str, value: Mapping[str, Json]) -> None:
        """Leave an advisory note (seconds, machine): not part of the archive's identity, never relied upon."""
        data = canonical(dict(value))
        if not NOTE_NAME.fullmatch(name) or len(data) > limits.MAX_METADATA_BYTES:
            raise UsageError(f"a note has a short name of a-z, 0-9, '_' and '-' and at most 1 MiB, found {name[:80]!a}")
        path = self.path / layout.NOTES / f"{name}.json"
        with disk_trouble("write", path):
            self._files.publish(path, data)

    # -- sealing ------------------------------------------------------------------------------------------------------

    def seal(self, views: int | None = None) -> str:
        """Write the manifest and return the archive's id. With `views`, a prefix: the archive then offers no more."""
        views = self.spec.num_views if views is None else views
        if not 1 <= views <= self.spec.num_views:
            raise OutOfRange(f"cannot seal {views} views of an archive of {self.spec.num_views}")
        with disk_trouble("seal", self.path, RERUN):
            self._refuse_incomplete(views)
            records = [self._load(block, names) for block, names in self._all_blocks(views)]
            for record in records:
                if not self._commits.settle(record):
                    raise Incomplete(f"{self.path}: files of {record.block} are missing or cut short; resume it first")
            self._tree.write_metadata(self.spec, self.teachers)
            manifest = make_manifest(self.spec, self.teachers, records, views).to_bytes()
            check_manifest(manifest)
            self._tree.sweep()
            self._tree.sync_folders(self.spec, self.teachers)
            path = self.path / layout.MANIFEST
            if path.exists() and read_small(path, limits.MAX_MANIFEST_BYTES) == manifest:
                self._files.sync_directory(path.parent)
            else:
                self._files.publish(path, manifest)
        return sha256(manifest)

    def _refuse_incomplete(self, views: int) -> None:
        present = self._commits.names()
        blocks = [block for block, _ in self._all_blocks(views)]
        missing = [block for block in blocks if block.record_path not in present]
        if missing:
            raise Incomplete(
                f"{self.path}: {len(missing)} of {len(blocks)} blocks are missing, the first is {missing[0]}; "
                "finish them, or seal a prefix of the views"
            )


def _encode(layouts: Mapping[str, ArrayLayout], arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """The shards of arrays without views."""
    return {array.shard_path(0, 0): encode_shard(array, arrays[name]) for name, array in layouts.items()}


def _holds_files(path: Path) -> bool:
    """Is anything here that is not the leftover of a create that died?"""
    return any(not is_leftover(inner) for inner in path.iterdir())
