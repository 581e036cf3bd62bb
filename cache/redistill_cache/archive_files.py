"""The two documents of an archive that are parsed: its own zarr.json and its teachers'."""

from __future__ import annotations

from pathlib import Path

from redistill_cache import layout, limits
from redistill_cache.errors import Damaged, NotAnArchive, Refused, UsageError
from redistill_cache.spec import (
    VERSION,
    ArchiveSpec,
    TeacherSpec,
    archive_identity,
    parse_archive_spec,
    parse_teacher_spec,
    parse_version,
    teacher_identity,
)
from redistill_cache.storage import read_small
from redistill_cache.strict_json import Fields, Json, parse

__all__ = ["list_teachers", "read_root", "read_teacher"]

EXPECTED = "expected a folder like name.redistill.zarr, made by 'redistill cache-teacher'"


def read_root(path: Path) -> tuple[ArchiveSpec, str]:
    """The specification of the archive at `path` and its identity."""
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
        layout.check_file_count(spec, {})
    except UsageError as error:
        raise Refused(f"{where}: {error}") from None
    _check_bytes(data, layout.root_metadata(spec), value, where)
    return spec, archive_identity(value)


def read_teacher(path: Path, name: str, spec: ArchiveSpec, identity: str) -> tuple[TeacherSpec, str]:
    """The specification of one teacher of the archive with this identity, and its own identity."""
    file = path / layout.teacher_path(name)
    data = read_small(file, limits.MAX_METADATA_BYTES)
    document = parse(data, cap=limits.MAX_METADATA_BYTES, where=str(file))
    attributes = Fields(document, str(file)).mapping("attributes")
    value = Fields(attributes, str(file)).mapping("redistill_teacher")
    teacher = parse_teacher_spec(value, str(file), spec.block_rows)
    if teacher.name != name:
        raise Refused(f"{file}: this is teacher {teacher.name!r}, expected {name!r}")
    _check_bytes(data, layout.teacher_metadata(teacher), value, str(file))
    return teacher, teacher_identity(identity, value)


def _check_bytes(data: bytes, expected: bytes, value: Json, where: str) -> None:
    """A document of our minor version or an older one is fully known, so its bytes are too."""
    _, minor = parse_version(Fields(value, where), where)
    if minor <= VERSION[1] and data != expected:
        raise Damaged(f"{where}: not the bytes that its own content makes; it was edited or damaged")


def list_teachers(path: Path) -> list[str]:
    """Names of the teachers declared on disk, committed or not."""
    folder = path / "teachers"
    if not folder.is_dir():
        return []
    names = sorted(inner.name for inner in folder.iterdir() if (inner / "zarr.json").is_file())
    if len(names) > limits.MAX_TEACHERS:
        raise Refused(f"{folder}: {len(names)} teachers, more than the limit of {limits.MAX_TEACHERS}")
    return names
