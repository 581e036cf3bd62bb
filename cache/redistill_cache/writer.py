"""Writing an archive. Its bytes do not depend on the number of processes or on crashes.

    writer = ArchiveWriter.create(path, spec)            # or .resume(path, spec) after a crash, or to add to it
    writer.write_samples(keys, labels, digests, sizes)
    writer.add_teacher(teacher, side={"logits": codec.side()})
    for block in writer.missing("teachers/resnet50"):
        writer.write(block, arrays, stats)               # arrays: {"logits/q": int8 [n, 64], ...}
    archive_id = writer.seal()

Every call is durable when it returns. commits.py explains how a block is committed, and why two writers cannot mix.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from redistill_cache import layout, limits
from redistill_cache.codecs import open_codec
from redistill_cache.codecs.stats import check_stats, merge_stats
from redistill_cache.commits import ArchiveFolders, Commits
from redistill_cache.copies import refuse_partial_copy
from redistill_cache.errors import Damaged, Incomplete, OutOfRange, Refused, SpecMismatch, UsageError
from redistill_cache.journal import FILES, FileEntry, Manifest, Record, parse_header, parse_record, sha256
from redistill_cache.keys import PackedKeys, keys_flaw, pack_keys
from redistill_cache.layout import ArrayLayout, Block, all_blocks, part_blocks, parts, samples_block, side_block
from redistill_cache.open_state import check_keys_size, check_side_size, read_committed, read_state
from redistill_cache.reader import Archive
from redistill_cache.rows import codec_out_of_range, row_out_of_range
from redistill_cache.shards import encode_shard
from redistill_cache.spec import (
    TERMS,
    ArchiveSpec,
    TeacherSpec,
    additions_flaw,
    archive_identity,
    is_name,
    teacher_identity,
)
from redistill_cache.spec_files import list_teachers, read_root, read_teachers
from redistill_cache.storage import LOCAL, MOST_FILES, Files, disk_trouble, is_leftover, read_small, walk_regular
from redistill_cache.strict_json import Json, canonical

__all__ = ["ArchiveWriter", "first_difference", "refuse_difference", "shown"]


# -- checks before writing --------------------------------------------------------------------------------------------


def refuse_difference(stored: Json, requested: Json, where: str, free: Sequence[str] = ()) -> None:
    """`SpecMismatch` with the first field that differs; the fields in `free` may differ."""
    if difference := first_difference(stored, requested, free):
        field, old, new = difference
        more_views = field == "num_views" and new > old
        hint = "use extend_views (--extend-views)" if more_views else "use the same setting"
        raise SpecMismatch(
            f"{where} was started with {field} = {shown(old)}, now it is {shown(new)}; {hint}, or start a new archive"
        )


def shown(value: Json) -> str:
    """A value of a specification in an error."""
    return ascii(value)[:80]


def first_difference(stored: Json, other: Json, free: Sequence[str] = ()) -> tuple[str, Json, Json] | None:
    """The first field that differs, with both values; the fields in `free` may differ."""
    return _first_difference(
        {key: value for key, value in stored.items() if key not in free},
        {key: value for key, value in other.items() if key not in free},
        "",
    )


def _first_difference(old: Json, new: Json, path: str) -> tuple[str, Json, Json] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{path}.{key}" if path else key, old.get(key), new.get(key)) for key in sorted(old.keys() | new)]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:  # canonical bytes, because 1, 1.0 and true are equal to Python and different JSON
        return None if canonical(old) == canonical(new) else (path, old, new)
    differences = (_first_difference(a, b, where) for where, a, b in pairs)
    return next((difference for difference in differences if difference), None)


def check_names(arrays: Mapping[str, np.ndarray], layouts: Mapping[str, ArrayLayout], what: str) -> None:
    if set(arrays) != set(layouts):
        missing, unknown = sorted(set(layouts) - set(arrays)), sorted(set(arrays) - set(layouts))
        raise UsageError(f"{what}: arrays missing: {missing or 'none'}, arrays unknown: {unknown or 'none'}")


def check_block_array(name: str, array: np.ndarray, expected: ArrayLayout, rows: int) -> None:
    shape = (rows, *expected.row_shape)
    if array.dtype != np.dtype(expected.dtype) or array.shape != shape:
        raise UsageError(
            f"array {name!r} must be {expected.dtype} {list(shape)}, found {array.dtype} {list(array.shape)}"
        )


def check_codecs(teacher: TeacherSpec, side: Mapping[str, np.ndarray]) -> None:
    """`UsageError` for side data ("<signal>/<array>") that a reader would refuse to decode with."""
    for signal in teacher.signals:
        prefix = f"{signal.name}/"
        own = {name.removeprefix(prefix): array for name, array in side.items() if name.startswith(prefix)}
        try:
            problem = codec_out_of_range(open_codec(signal.codec, signal.width, signal.config, own))
        except Damaged as error:
            problem = str(error)
        if problem:
            raise UsageError(f"teacher {teacher.name!r}, signal {signal.name!r}: {problem}")


def check_record(record: Record, teachers: Mapping[str, TeacherSpec]) -> None:
    """`UsageError` for a record that a reader would refuse."""
    data = record.to_bytes()
    try:
        parse_record(data, record.block, record.identity, "the record")
        if record.stats is not None and record.block.part.startswith("teachers/"):
            check_stats(teachers[record.block.part.split("/")[1]], record.stats, len(record.block.rows))
    except Damaged as error:
        raise UsageError(f"{record.block} cannot be committed with these stats: {error}; pass smaller ones") from None


# -- the manifest -----------------------------------------------------------------------------------------------------


def make_manifest(
    spec: ArchiveSpec,
    teachers: Mapping[str, TeacherSpec],
    records: Sequence[Record],
    views: int,
    teacher_views: Mapping[str, int],
    terms: Mapping[str, str],
) -> Manifest:
    """Every file with its hash, and the merged statistics: a pure function of the specification and the records."""
    documents = layout.expected_metadata(spec, teachers)
    documents["zarr.json"] = layout.root_metadata(spec)
    for name, teacher in teachers.items():
        documents[layout.teacher_path(name)] = layout.teacher_metadata(teacher)
    documents |= {record.block.record_path: record.to_bytes() for record in records}
    files = {path: FileEntry(len(data), sha256(data)) for path, data in documents.items()}
    for record in records:
        files |= record.files
    stats = {
        name: merge_stats(teacher, [r.stats for r in records if r.block.part == f"teachers/{name}"])
        for name, teacher in teachers.items()
    }
    return Manifest(archive_identity(spec.to_json()), views, stats, teacher_views, files, terms)


def check_manifest(data: bytes) -> None:
    """`Refused` for a manifest that a reader would refuse; its header holds all statistics."""
    header = data.index(FILES)
    if header > limits.MAX_METADATA_BYTES or len(data) > limits.MAX_MANIFEST_BYTES:
        raise Refused(
            f"the manifest would take {len(data)} bytes, {header} of them statistics; expected at most "
            f"{limits.MAX_MANIFEST_BYTES} and {limits.MAX_METADATA_BYTES}: use fewer teachers or signals in one archive"
        )


# -- the writer -------------------------------------------------------------------------------------------------------

RERUN = "; then run the same command again: committed blocks are kept"
# Only recorded, so it may differ when an archive is resumed.
NOT_COMPARED = ("environment",)
NOTE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,100}")


class ArchiveWriter:
    """Writes one archive. Threads may share a writer; every process creates its own."""

    def __init__(self, path: Path, spec: ArchiveSpec, files: Files) -> None:
        """Use `create`, `resume` or `extend_views`."""
        self.path = path
        self.spec = spec
        self.teachers: dict[str, TeacherSpec] = {}
        self._files = files
        self._commits = Commits(path, files)
        self._folders = ArchiveFolders(path, files)
        self._identity = archive_identity(spec.to_json())

    # -- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path, spec: ArchiveSpec, *, files: Files = LOCAL) -> ArchiveWriter:
        """Start a new archive. `Refused` when there is anything but an empty folder at `path`."""
        path = Path(path).absolute()
        spec = spec.resolved()
        layout.check_extent(spec, {})
        with disk_trouble("create", path):
            if path.is_symlink() or (path.exists() and (not path.is_dir() or _holds_files(path))):
                raise Refused(f"{path} exists already; resume it, remove it, or choose another path")
            files.make_directories(path)
            try:
                # First and exclusive: of two creators one wins, and all other metadata follows from this file.
                files.publish(path / "zarr.json", layout.root_metadata(spec), exclusive=True)
            except FileExistsError:
                raise Refused(f"{path}: another process created this archive at the same time; resume it") from None
            writer = cls(path, spec, files)
            writer._folders.write_metadata(writer.spec, writer.teachers)
        return writer

    @classmethod
    def resume(cls, path: str | Path, spec: ArchiveSpec | None = None, *, files: Files = LOCAL) -> ArchiveWriter:
        """Continue an archive, sealed or not. `SpecMismatch` names the field in which `spec` differs from it."""
        path = Path(path).absolute()
        with disk_trouble("resume", path):
            refuse_partial_copy(path, "changing it")
            root = read_root(path)
            if spec is not None:
                refuse_difference(root.spec.to_json(), spec.resolved().to_json(), str(path), NOT_COMPARED)
            walk_regular(path, most=MOST_FILES)  # never write through a link
            files.exclusive_by(path)
            writer = cls(path, root.spec, files)
            documents = read_teachers(path, list_teachers(path), root)
            root.require_writable(path)
            for document in documents.values():
                document.require_writable(path)
            writer.teachers = {name: document.spec for name, document in documents.items()}
            writer._folders.write_metadata(writer.spec, writer.teachers)
            writer._recover()
        return writer

    @classmethod
    def extend_views(cls, path: str | Path, num_views: int, *, files: Files = LOCAL) -> ArchiveWriter:
        """Raise the number of views of an archive; committed blocks are kept.

        Readers of a sealed archive are offered its old views until the next `seal`, which gives another id. It can be
        repeated after a crash at any point.
        """
        path = Path(path).absolute()
        with disk_trouble("extend", path):
            refuse_partial_copy(path, "changing it")
            root = read_root(path)
            root.require_writable(path)
            stored = root.spec
            if num_views < stored.num_views:
                raise Refused(f"{path} has {stored.num_views} views; it cannot shrink to {num_views}")
            if num_views > stored.num_views and stored.subset_of is not None:
                raise Refused(f"{path} is a subset of archive {stored.subset_of.id}; add views to that one")
            if num_views > stored.num_views:
                spec = replace(stored, num_views=num_views)
                layout.check_extent(spec, {})
                files.publish(path / "zarr.json", layout.root_metadata(spec))
        return cls.resume(path, files=files)

    def _recover(self) -> None:
        """Settle the commits of dead writers, and remove the records of blocks whose files are missing or truncated."""
        present = self._commits.names()
        for block, names in self._all_blocks(self.spec.num_views):
            if block.record_path in present and not self._commits.settle(self._load(block, names)):
                self._commits.forget(block)
        self._folders.sync_folders(self.spec, self.teachers)

    # -- progress -----------------------------------------------------------------------------------------------------

    def parts(self) -> list[str]:
        """The parts that are written in blocks of rows or of canaries."""
        return parts(self.spec, self.teachers)

    def missing(self, part: str) -> list[Block]:
        """The blocks of a part that no process has committed yet, view by view."""
        if not self._arrays_of(part):
            return []
        with disk_trouble("read", self.path):
            present = self._commits.names()
        blocks = part_blocks(self.spec, part, self.spec.num_views)
        return [block for block in blocks if block.record_path not in present]

    def is_committed(self, block: Block) -> bool:
        """Whether any process has committed this block by now."""
        return self._commits.is_committed(block)

    def read_back(self) -> Archive:
        """The archive as committed by now, to check what was written or to continue with its codecs.

        Blocks that another process is committing at the moment are settled and included.
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
        """Write the sample index. Repeating it with the same data does nothing; other data raises `SpecMismatch`.

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
        flaw = keys_flaw(packed)
        if flaw:
            raise UsageError(flaw)
        layouts = layout.sample_arrays(self.spec, len(packed.data))
        for name, array in layouts.items():
            check_block_array(name, arrays[name], array, array.shape[0])
        low, high = int(arrays["label"].min()), int(arrays["label"].max())
        if low < -1 or high >= self.spec.num_classes:
            raise UsageError(f"labels must be from 0 to {self.spec.num_classes - 1} (or -1), found {low} to {high}")
        data = _encode(layouts, arrays)
        check_keys_size(self.spec, len(packed.data), len(data[layouts["key_bytes"].shard_path(0, 0)]))
        data[layouts["key_bytes"].metadata_path] = layouts["key_bytes"].metadata_bytes()
        self._write_once(samples_block(self.spec), data, "the sample index")

    def add_teacher(
        self, teacher: TeacherSpec, side: Mapping[str, Mapping[str, np.ndarray]] | None = None
    ) -> TeacherSpec:
        """Declare a teacher and write its side data: {signal: {name: array}}. No existing file changes.

        Repeating it with the same specification and side data does nothing; others raise `SpecMismatch`.
        """
        teacher = teacher.resolved(self.spec.block_rows)
        self.spec.check_teacher(teacher)
        teachers = self.teachers | {teacher.name: teacher}
        layout.check_extent(self.spec, teachers)
        if flaw := additions_flaw(teachers):
            raise Refused(f"{self.path}: {flaw}")
        layouts = layout.side_arrays(teacher)
        arrays = {
            f"{signal}/{name}": np.asarray(array)
            for signal, signal_arrays in (side or {}).items()
            for name, array in signal_arrays.items()
        }
        check_names(arrays, layouts, f"side data of teacher {teacher.name!r}")
        for name, array in layouts.items():
            check_block_array(name, arrays[name], array, array.shape[0])
        check_codecs(teacher, arrays)
        data = _encode(layouts, arrays)
        check_side_size(teacher, lambda path: len(data[path]))
        self.declare_teacher(teacher)
        self._write_once(side_block(teacher.name), data, f"side data of teacher {teacher.name!r}")
        return teacher

    def declare_teacher(self, teacher: TeacherSpec) -> None:
        """The first half of `add_teacher`, for a resolved and checked teacher whose side data is written as a block."""
        path = self.path / layout.teacher_path(teacher.name)
        with disk_trouble("write", path, RERUN):
            self._files.make_directories(path.parent)
            if not path.exists():
                with contextlib.suppress(FileExistsError):  # another process was first: compared below
                    self._files.publish(path, layout.teacher_metadata(teacher), exclusive=True)
            stored = read_teachers(self.path, [teacher.name], read_root(self.path))[teacher.name].spec
            refuse_difference(stored.to_json(), teacher.to_json(), f"{self.path}: teacher {teacher.name!r}")
            self.teachers[teacher.name] = stored
            self._folders.write_metadata(self.spec, self.teachers)

    def _write_once(self, block: Block, data: Mapping[str, bytes], what: str) -> None:
        """Commit a block that an archive has once; if it is committed already, it must have the same bytes."""
        with disk_trouble("write", self.path, RERUN):
            entries = {path: FileEntry(len(content), sha256(content)) for path, content in data.items()}
            if not self.is_committed(block):
                for path, content in data.items():
                    self._commits.stage(path, content)
                if self._commits.commit(Record(block, self._identity_of(block), entries)):
                    return
            committed = self._load(block, entries).files
            differing = sorted(path for path, entry in committed.items() if entries.get(path) != entry)
        if differing:
            raise SpecMismatch(
                f"{self.path}: {what} was written before and differs (in {differing[0]}), so the data or a library "
                "changed; use those the archive was started with, or start a new archive"
            )

    def write(
        self, block: Block, arrays: Mapping[str, np.ndarray], stats: Mapping[str, Json] | None = None
    ) -> Record | None:
        """Commit one block and return its record; None when another writer was first, whose data is then stored.

        `arrays` has every array of the part: "crop" for views, "row" and "pixels" for canaries, "<signal>/<array>" for
        a teacher, each [rows of the block, ...]. `stats`, per signal, is stored in the commit record.
        """
        layouts = self._arrays_of(block.part)
        self._check_block(block)
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        check_names(arrays, layouts, str(block))
        for name, array in layouts.items():
            check_block_array(name, arrays[name], array, block.stop - block.start)
            bad = row_out_of_range(arrays[name])
            if bad is not None:
                raise UsageError(
                    f"{block}: row {block.start + bad} of array {name!r} holds NaN, Inf or a value above 2^100 in "
                    "magnitude, which no reader accepts"
                )
        shards = ((a.shard_path(block.view, block.index), encode_shard(a, arrays[name])) for name, a in layouts.items())
        return self.write_encoded(block, shards, stats)

    def write_encoded(
        self, block: Block, files: Iterable[tuple[str, bytes]], stats: Mapping[str, Json] | None = None
    ) -> Record | None:
        """Commit a block of any part whose files (path, bytes) exist already, such as those of another archive.

        They are taken one at a time, so that only one is in memory, and must be those of the block.
        """
        with disk_trouble("write", self.path, RERUN):
            if self.is_committed(block):
                return None
            try:
                entries = {path: self._commits.stage(path, data) for path, data in files}
                record = Record(block, self._identity_of(block), entries, stats)
                check_record(record, self.teachers)
                return record if self._commits.commit(record) else None
            except FileNotFoundError:
                # `seal` of another process removed the staged files, after another writer had committed the block.
                if self.is_committed(block):
                    return None
                raise

    def _check_block(self, block: Block) -> None:
        per_view = 1 if block.part == "canaries" else self.spec.blocks_per_view
        if not (0 <= block.view < self.spec.num_views and 0 <= block.index < per_view):
            raise OutOfRange(f"{block}: the archive has {self.spec.num_views} views of {per_view} blocks")
        expected = next(b for b in part_blocks(self.spec, block.part, 1) if b.index == block.index)
        if (block.start, block.stop) != (expected.start, expected.stop):
            raise UsageError(f"{block} has rows {expected.start} to {expected.stop}; take blocks from missing()")

    def note(self, name: str, value: Mapping[str, Json]) -> None:
        """Write an advisory note (seconds, machine): not part of the archive's identity, never read."""
        data = canonical(dict(value))
        if not NOTE_NAME.fullmatch(name) or len(data) > limits.MAX_METADATA_BYTES:
            raise UsageError(
                f"a note must have a short name of a-z, 0-9, '_' and '-' and take at most 1 MiB, found {name[:80]!a}"
            )
        path = self.path / layout.NOTES / f"{name}.json"
        with disk_trouble("write", path):
            self._files.publish(path, data)

    # -- sealing ------------------------------------------------------------------------------------------------------

    def seal(self, views: int | None = None, *, complete: bool = False) -> str:
        """Write the manifest and return the archive's id.

        With `views`, readers are offered only these first views; with `complete`, the leading views that are complete
        for at least one teacher. Of every teacher its leading complete views are offered; one without any is left out.
        """
        with disk_trouble("seal", self.path, RERUN):
            while True:
                self._reload()
                before = self._commits.names()
                manifest = self._seal_once(self._complete_views(before) if complete else views, before)
                # Another process may have committed the rest of its teacher, and sealed, before this manifest replaced
                # its own.
                if self._commits.names() == before:
                    return sha256(manifest)

    def _reload(self) -> None:
        """The views and teachers that are declared by now: another process may have added some."""
        root = read_root(self.path)
        self.spec = root.spec
        documents = read_teachers(self.path, list_teachers(self.path), root)
        self.teachers = {name: document.spec for name, document in documents.items()}

    def edit_terms(self, **terms: str) -> str:
        """Replace some of the terms of a sealed archive, such as its licence, and return its new id.

        They are stated in the manifest, so no other file changes, and blocks stay bound to the specification.
        """
        with disk_trouble("edit", self.path, RERUN):
            if not self.sealed:
                raise Incomplete(f"{self.path} is not finished: run the command that writes it again, then edit it")
            edited = read_state(self.path, allow_partial=False).spec.with_terms(terms)
            self._reload()
            present = self._commits.names()
            values = {name: getattr(edited, name) for name in TERMS}
            same = all(getattr(self.spec, name) == value for name, value in values.items())
            return sha256(self._seal_once(self._complete_views(present), present, {} if same else values))

    def teacher_bytes(self, name: str) -> int:
        """The bytes that removing a teacher frees."""
        with disk_trouble("read", self.path):
            parts = (name, *self.additions(name))
            return sum(file.stat().st_size for part in parts for file in self._files_of_teacher(part))

    def remove_teacher(self, name: str) -> None:
        """Remove a teacher with the signals that were added to it; repeated after a crash, it removes the rest.

        The manifest goes first, so that readers have the archive with the teacher or without it. Then the added parts,
        each with its declaration last, so that a repeated call finds them; then the declaration of the teacher: its
        other files are then no part of the archive, whatever a crash leaves of them.
        """
        with disk_trouble("remove a teacher of", self.path, RERUN):
            files = {part: self._files_of_teacher(part) for part in (*self.additions(name), name)}
            if self.sealed:
                self._reload()
                for part in files:
                    self.teachers.pop(part, None)
                present = self._commits.names()
                self._seal_once(self._complete_views(present), present)
            for part in files:
                self._remove_files(part, files[part], declaration_first=part == name)
                self.teachers.pop(part, None)

    def additions(self, name: str) -> list[str]:
        """The parts with signals that were added to a teacher."""
        return sorted(part.name for part in self.teachers.values() if part.adds_to == name)

    def _remove_files(self, name: str, files: Collection[Path], *, declaration_first: bool) -> None:
        declaration, folder = self.path / layout.teacher_path(name), self.path / "teachers" / name
        for file in sorted(files, key=lambda file: ((file == declaration) != declaration_first, file)):
            self._files.remove(file)
            if file == declaration:
                self._files.sync_directory(folder)
        self._files.sync_directory(self.path / layout.BLOCKS)
        folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
        for inner in sorted(folders, reverse=True):
            self._files.remove_directory(inner)
        self._files.sync_directory(folder.parent)

    def _files_of_teacher(self, name: str) -> list[Path]:
        """Its declaration, records and data. `OutOfRange` if there is nothing of such a teacher."""
        folder = self.path / "teachers" / name
        valid = is_name(name)
        records = [self.path / record for record in self._commits.names() if valid and _is_of_teacher(record, name)]
        if not valid or not (records or folder.is_dir()):
            known = ", ".join(self.teachers) or "none"
            raise OutOfRange(f"{self.path} has no teacher {name!r}; teachers: {known}")
        inside = walk_regular(folder, most=MOST_FILES) if folder.is_dir() else set()
        return [*records, *(folder / file for file in inside)]

    def _terms(self) -> Mapping[str, str]:
        """The terms as they were edited last."""
        for path in (self.path / layout.MANIFEST, self.path / layout.OLD_MANIFEST):
            try:
                return parse_header(read_small(path, limits.MAX_MANIFEST_BYTES), str(path)).terms
            except FileNotFoundError:
                continue
        return {}

    def _seal_once(self, views: int | None, present: Collection[str], terms: Mapping[str, str] | None = None) -> bytes:
        views = self.spec.num_views if views is None else views
        if not 1 <= views <= self.spec.num_views:
            raise OutOfRange(f"cannot seal {views} views of an archive of {self.spec.num_views}")
        leading = {name: self._leading_views(f"teachers/{name}", views, present) for name in self.teachers}
        self._refuse_incomplete(views, leading, present)
        # A teacher that was damaged is written again; until then, what was added to it is left out as well.
        teachers = {
            name: teacher for name, teacher in self.teachers.items() if leading[name] and leading.get(teacher.owner, 0)
        }
        fewer = {name: leading[name] for name in teachers if leading[name] < views}
        blocks = all_blocks(self.spec, teachers, views, fewer)
        records = [self._load(block, names) for block, names in blocks]
        for record in records:
            if not self._commits.settle(record):
                raise Incomplete(f"{self.path}: files of {record.block} are missing or cut short; resume it first")
        self._folders.write_metadata(self.spec, self.teachers)
        sealed = make_manifest(self.spec, teachers, records, views, fewer, self._terms() if terms is None else terms)
        manifest = sealed.to_bytes()
        check_manifest(manifest)
        # Where blocks are still to come, other processes may be writing them.
        everything = all(count == self.spec.num_views for count in (views, *leading.values()))
        self._folders.sweep(None if everything else {*sealed.files, layout.MANIFEST})
        self._folders.sync_folders(self.spec, self.teachers)
        path = self.path / layout.MANIFEST
        if path.exists() and read_small(path, limits.MAX_MANIFEST_BYTES) == manifest:
            self._files.sync_directory(path.parent)
        else:
            self._files.publish(path, manifest)
        return manifest

    def _leading_views(self, part: str, views: int, present: Collection[str]) -> int:
        """How many of the first views of a part are complete; 0 for a teacher without its side data."""
        name = part.removeprefix("teachers/")
        if part.startswith("teachers/") and side_block(name).record_path not in present:
            return 0
        missing = (b.view for b in part_blocks(self.spec, part, views) if b.record_path not in present)
        return next(missing, views)

    def _bases(self) -> dict[str, TeacherSpec]:
        """The teachers without the parts that add signals to them."""
        return {name: teacher for name, teacher in self.teachers.items() if teacher.adds_to is None}

    def _complete_views(self, present: Collection[str]) -> int:
        """The leading views that at least one teacher has; at least 1, so that sealing says what is missing."""
        counts = {part: self._leading_views(part, self.spec.num_views, present) for part in self.parts()}
        teachers = {f"teachers/{name}" for name in self._bases()}
        of_teachers = [count for part, count in counts.items() if part in teachers]
        counts = {part: count for part, count in counts.items() if not part.startswith("teachers/")}
        return max(1, min([*counts.values(), max(of_teachers, default=self.spec.num_views)], default=1))

    def _refuse_incomplete(self, views: int, leading: Mapping[str, int], present: Collection[str]) -> None:
        """`Incomplete` unless all that the teachers share, and at least one teacher, has these views."""
        bases = self._bases()
        needed = bases if bases and max(leading[name] for name in bases) < views else {}
        blocks = [block for block, _ in all_blocks(self.spec, needed, views)]
        missing = [block for block in blocks if block.record_path not in present]
        if missing:
            raise Incomplete(
                f"{self.path}: {len(missing)} of {len(blocks)} blocks are missing, the first is {missing[0]}; "
                "finish them, or seal a prefix of the views"
            )


def _encode(layouts: Mapping[str, ArrayLayout], arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """The shards of arrays without views, by path."""
    return {array.shard_path(0, 0): encode_shard(array, arrays[name]) for name, array in layouts.items()}


def _is_of_teacher(record: str, name: str) -> bool:
    """Whether a commit record is of this teacher; names have no dots."""
    return record.startswith(f"{layout.BLOCKS}/teachers.{name}.")


def _holds_files(path: Path) -> bool:
    """Whether a folder holds anything but the partial file of a `create` that was killed."""
    return any(not is_leftover(inner) for inner in path.iterdir())
