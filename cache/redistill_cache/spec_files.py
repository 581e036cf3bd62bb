"""Parsing the untrusted specifications of an archive: its root zarr.json, and one zarr.json per teacher.

Every other zarr.json is only compared with the bytes that layout.py generates.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from redistill_cache import layout, limits
from redistill_cache.errors import Damaged, NewerFormat, NotAnArchive, Refused, UsageError
from redistill_cache.spec import (
    ADDED_TERMS,
    FORMAT,
    ROOT_MINOR,
    TEACHER_MINOR,
    VERSION,
    ArchiveSpec,
    ArraySpec,
    Parent,
    SideArray,
    SignalSpec,
    TeacherSpec,
    archive_identity,
    check_array,
    chunks_fit,
    teacher_identity,
)
from redistill_cache.storage import read_small
from redistill_cache.strict_json import Fields, Json, parse

__all__ = [
    "Document",
    "list_teachers",
    "parse_archive_spec",
    "parse_teacher_spec",
    "parse_version",
    "read_root",
    "read_teachers",
]


# -- specifications ---------------------------------------------------------------------------------------------------


def _parse_array(value: Json, where: str, block_rows: int) -> ArraySpec:
    fields = Fields(value, where)
    array = ArraySpec(
        name=fields.text("name", 64),
        dtype=fields.text("dtype", 16),
        row_shape=fields.integers("row_shape", 6),
        chunk_rows=fields.integer("chunk_rows", 1, block_rows),
        transpose=fields.flag("transpose"),
        level=fields.integer("level", 1, 22),
    )
    fields.done()
    check_array(array, where)
    chunk_rows = array.chunk_rows or 0
    if block_rows % chunk_rows or not chunks_fit(array, chunk_rows, block_rows):
        expected = f"a divisor of {block_rows} that makes at most {limits.MAX_CHUNKS} chunks"
        fields.refuse("chunk_rows", f"{expected} of at most {limits.MAX_CHUNK_BYTES} bytes")
    return array


def _parse_side(value: Json, where: str) -> SideArray:
    fields = Fields(value, where)
    side = SideArray(fields.text("name", 64), fields.text("dtype", 16), fields.integers("shape", 6))
    fields.done()
    return side


def _parse_signal(value: Json, where: str, block_rows: int) -> SignalSpec:
    fields = Fields(value, where)
    signal = SignalSpec(
        name=fields.text("name", 64),
        codec=fields.text("codec", 64),
        width=fields.integer("width", 1, limits.MAX_WIDTH),
        config=fields.mapping("config"),
        arrays=tuple(_parse_array(item, where, block_rows) for item in fields.items("arrays", limits.MAX_ARRAYS)),
        side=tuple(_parse_side(item, where) for item in fields.items("side", limits.MAX_ARRAYS)),
    )
    fields.done()
    return signal


def parse_version(fields: Fields, where: str) -> tuple[int, int]:
    """The format version; `Refused` when this reader does not support its major part."""
    text = fields.text("version", 16)
    match = re.fullmatch(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})", text)
    if not match:
        fields.refuse("version", "MAJOR.MINOR")
    major, minor = int(match[1]), int(match[2])
    if major != VERSION[0]:
        newer = major > VERSION[0]
        advice = "upgrade redistill (pip install -U redistill)" if newer else "that version was never released"
        kind = NewerFormat if newer else Refused
        raise kind(f"{where}: archive format {text}, this version of redistill reads {VERSION[0]}.x; {advice}")
    return major, minor


def parse_archive_spec(value: Json, where: str) -> ArchiveSpec:
    """The specification from the untrusted attributes of an archive's root zarr.json."""
    fields = Fields(value, where)
    if fields.text("format", 64) != FORMAT:
        fields.refuse("format", repr(FORMAT))
    _, minor = parse_version(fields, where)
    block_rows = fields.integer("block_rows", 1, limits.MAX_BLOCK_ROWS)
    arrays = fields.items("view_arrays", limits.MAX_ARRAYS)
    try:
        spec = ArchiveSpec(
            num_samples=fields.integer("num_samples", 1, limits.MAX_SAMPLES),
            num_views=fields.integer("num_views", 1, limits.MAX_VIEWS),
            num_classes=fields.integer("num_classes", 1, limits.MAX_CLASSES),
            class_names=None if fields.is_null("class_names") else fields.texts("class_names", limits.MAX_CLASS_NAMES),
            block_rows=block_rows,
            recipe=fields.mapping("recipe"),
            seed=fields.integer("seed", 0, 2**64 - 1),
            view_arrays=tuple(_parse_array(item, f"{where}: view_arrays", block_rows) for item in arrays),
            canaries_per_view=fields.integer("canaries_per_view", 0, limits.MAX_CANARIES),
            source=fields.mapping("source"),
            excluded=tuple(_parse_excluded(item, where) for item in fields.items("excluded", limits.MAX_EXCLUDED)),
            licence=fields.text("licence", limits.MAX_TEXT),
            citation=fields.text("citation", limits.MAX_TEXT),
            environment=fields.mapping("environment"),
            subset_of=_parse_parent(fields, where) if minor >= ROOT_MINOR and "subset_of" in fields else None,
            **_parse_added_terms(fields, minor),
        )
    except UsageError as error:  # the same rules hold for a caller and for a file
        raise Refused(f"{where}: {error}") from None
    fields.done(ignore_unknown=minor > ROOT_MINOR)
    return spec


def _parse_added_terms(fields: Fields, minor: int) -> dict[str, str]:
    known = ADDED_TERMS if minor >= ROOT_MINOR else ()
    return {name: fields.text(name, limits.MAX_TEXT) for name in known if name in fields}


def _parse_parent(root: Fields, where: str) -> Parent:
    fields = Fields(root.mapping("subset_of"), f"{where}: subset_of")
    parent = Parent(fields.text("id", 64), fields.integers("views", limits.MAX_VIEWS))
    fields.done()
    return parent


def _parse_excluded(value: Json, where: str) -> dict[str, str]:
    fields = Fields(value, f"{where}: excluded")
    item = {"key": fields.text("key", limits.MAX_TEXT), "reason": fields.text("reason", limits.MAX_TEXT)}
    fields.done()
    return item


def parse_teacher_spec(value: Json, where: str, block_rows: int) -> TeacherSpec:
    """A teacher from the untrusted attributes of its zarr.json."""
    fields = Fields(value, where)
    _, minor = parse_version(fields, where)
    try:
        teacher = TeacherSpec(
            name=fields.text("name", 64),
            adds_to=fields.text("adds_to", 64) if minor >= TEACHER_MINOR and "adds_to" in fields else None,
            model=fields.mapping("model"),
            signals=tuple(
                _parse_signal(item, f"{where}: signals", block_rows)
                for item in fields.items("signals", limits.MAX_SIGNALS)
            ),
        )
    except UsageError as error:
        raise Refused(f"{where}: {error}") from None
    fields.done(ignore_unknown=minor > TEACHER_MINOR)
    return teacher


# -- files ------------------------------------------------------------------------------------------------------------

EXPECTED = "expected a folder like name.redistill.zarr, written by 'redistill cache-teacher'"
Spec = TypeVar("Spec", ArchiveSpec, TeacherSpec)


@dataclass(frozen=True)
class Document(Generic[Spec]):
    """A specification as read: `value` is its JSON, `identity` binds commit records to it, `data` are its bytes."""

    spec: Spec
    value: Mapping[str, Json] = field(repr=False)
    identity: str
    data: bytes = field(repr=False)
    newer: str | None  # the version if its minor part is newer than this reader: unknown members were ignored

    def require_writable(self, path: Path) -> None:
        """`NewerFormat` when writing could lose members that were ignored."""
        if self.newer:
            raise NewerFormat(
                f"{path}: archive format {self.newer} can be read by this version of redistill, but not added to; "
                "upgrade redistill (pip install -U redistill)"
            )


def read_root(path: Path) -> Document[ArchiveSpec]:
    """The specification of the archive at `path`."""
    if not path.is_dir():
        reason = "it is a file" if path.exists() else "it does not exist"
        raise NotAnArchive(f"{path} is not a redistill archive: {reason}; {EXPECTED}")
    try:
        data = read_small(path / "zarr.json", limits.MAX_ROOT_BYTES)
    except FileNotFoundError:
        raise NotAnArchive(f"{path} is not a redistill archive: it has no zarr.json; {EXPECTED}") from None
    where = str(path / "zarr.json")
    document = parse(data, cap=limits.MAX_ROOT_BYTES, where=where)
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or "redistill" not in attributes:
        raise NotAnArchive(f"{path} is not a redistill archive: its zarr.json has no attribute 'redistill'; {EXPECTED}")
    value = attributes["redistill"]
    spec = parse_archive_spec(value, where)
    try:
        layout.check_extent(spec, {})
    except UsageError as error:
        raise Refused(f"{where}: {error}") from None
    newer = _check_bytes(data, layout.root_metadata(spec), value, where, ROOT_MINOR)
    return Document(spec, value, archive_identity(value), data, newer)


def read_teachers(path: Path, names: Iterable[str], root: Document[ArchiveSpec]) -> dict[str, Document[TeacherSpec]]:
    """The teachers with these names; `Refused` when together they exceed the limits of an archive."""
    documents: dict[str, Document[TeacherSpec]] = {}
    for name in sorted(names):
        documents[name] = _read_teacher(path / layout.teacher_path(name), name, root)
        try:
            layout.check_extent(root.spec, {name: document.spec for name, document in documents.items()})
        except UsageError as error:
            raise Refused(f"{path}: {error}") from None
    return documents


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
        raise Refused(f"{where}: expected teacher {name!r}, found {teacher.name!r}")
    try:
        root.spec.check_teacher(teacher)
    except UsageError as error:
        raise Refused(f"{where}: {error}") from None
    newer = _check_bytes(data, layout.teacher_metadata(teacher), value, where, TEACHER_MINOR)
    return Document(teacher, value, teacher_identity(root.identity, value), data, newer)


def _check_bytes(data: bytes, expected: bytes, value: Json, where: str, newest: int) -> str | None:
    """`Damaged` unless the bytes follow from the content. A newer minor version is returned instead of checked."""
    major, minor = parse_version(Fields(value, where), where)
    if minor > newest:
        return f"{major}.{minor}"
    if data != expected:
        raise Damaged(f"{where}: not the canonical form of its content; it was edited or damaged")
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
