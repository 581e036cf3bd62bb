"""The two documents of an archive that are parsed: its own zarr.json and its teachers'."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from redistill_cache import layout, limits
from redistill_cache.errors import Damaged, NewerFormat, NotAnArchive, Refused, UsageError
from redistill_cache.parsing import parse_archive_spec, parse_teacher_spec, parse_version
from redistill_cache.spec import VERSION, ArchiveSpec, TeacherSpec, archive_identity, teacher_identity
from redistill_cache.storage import read_small
from redistill_cache.strict_json import Fields, Json, parse

__all__ = ["Document", "list_teachers", "read_root", "read_teachers"]

EXPECTED = "expected a folder like name.redistill.zarr, made by 'redistill cache-teacher'"
Spec = TypeVar("Spec", ArchiveSpec, TeacherSpec)


@dataclass(frozen=True)
class Document(Generic[Spec]):
    """A specification as it was found: `identity` binds commit records to it, `data` are its bytes."""

    spec: Spec
    identity: str
    data: bytes = field(repr=False)
    newer: str | None  # the minor version, where it is above ours: there may be members that we ignore

    def require_writable(self, path: Path) -> None:
        """Adding to what is not fully understood would lose the rest of it."""
        if self.newer:
            raise NewerFormat(
                f"{path}: written in archive format {self.newer}; this redistill reads it, and cannot add to it: "
                "upgrade redistill (pip install -U redistill)"
            )


def read_root(path: Path) -> Document[ArchiveSpec]:
    """The specification of the archive at `path`."""
    if not path.is_dir():
        found = "that is a file" if path.exists() else "nothing is there"
        raise NotAnArchive(f"{path} is not a redistill archive: {found}; {EXPECTED}")
    try:
        data = read_small(path / "zarr.json", limits.MAX_ROOT_BYTES)
    except FileNotFoundError:
        raise NotAnArchive(f"{path} is not a redistill archive: it has no zarr.json; {EXPECTED}") from None
    where = str(path / "zarr.json")
    document = parse(data, cap=limits.MAX_ROOT_BYTES, where=where)
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or "redistill" not in attributes:
        raise NotAnArchive(f"{path} is not a redistill archive: its zarr.json does not say so; {EXPECTED}")
    value = attributes["redistill"]
    spec = parse_archive_spec(value, where)
    try:
        layout.check_extent(spec, {})
    except UsageError as error:
        raise Refused(f"{where}: {error}") from None
    newer = _check_bytes(data, layout.root_metadata(spec), value, where)
    return Document(spec, archive_identity(value), data, newer)


def read_teachers(path: Path, names: Iterable[str], root: Document[ArchiveSpec]) -> dict[str, Document[TeacherSpec]]:
    """The teachers with these names, all of them within the limits of an archive together."""
    found: dict[str, Document[TeacherSpec]] = {}
    for name in sorted(names):
        found[name] = _read_teacher(path / layout.teacher_path(name), name, root)
        try:
            layout.check_extent(root.spec, {name: item.spec for name, item in found.items()})
        except UsageError as error:
            raise Refused(f"{path}: {error}") from None
    return found


def _read_teacher(file: Path, name: str, root: Document[ArchiveSpec]) -> Document[TeacherSpec]:
    where = str(file)
    try:
        data = read_small(file, limits.MAX_METADATA_BYTES)
    except FileNotFoundError:
        raise Damaged(f"{where} is missing; restore it, or fetch the archive again") from None
    document = parse(data, cap=limits.MAX_METADATA_BYTES, where=where)
    value = Fields(Fields(document, where).mapping("attributes"), where).mapping("redistill_teacher")
    teacher = parse_teacher_spec(value, where, root.spec.block_rows)
    if teacher.name != name:
        raise Refused(f"{where}: this is teacher {teacher.name!r}, expected {name!r}")
    try:
        root.spec.check_teacher(teacher)
    except UsageError as error:
        raise Refused(f"{where}: {error}") from None
    newer = _check_bytes(data, layout.teacher_metadata(teacher), value, where)
    return Document(teacher, teacher_identity(root.identity, value), data, newer)


def _check_bytes(data: bytes, expected: bytes, value: Json, where: str) -> str | None:
    """A document of our minor version is fully known, so its bytes are too; of a newer one, that version."""
    major, minor = parse_version(Fields(value, where), where)
    if minor > VERSION[1]:
        return f"{major}.{minor}"
    if data != expected:
        raise Damaged(f"{where}: not the bytes that its own content makes; it was edited or damaged")
    return None


def list_teachers(path: Path) -> list[str]:
    """Names of the teachers declared on disk, committed or not."""
    try:
        entries = os.scandir(path / "teachers")
    except FileNotFoundError:
        return []
    names: list[str] = []
    with entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and (path / layout.teacher_path(entry.name)).is_file():
                names.append(entry.name)
            if len(names) > limits.MAX_TEACHERS:
                raise Refused(f"{path / 'teachers'}: more than {limits.MAX_TEACHERS} teachers, the limit")
    return sorted(names)
