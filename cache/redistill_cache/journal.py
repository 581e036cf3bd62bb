"""The journal: one commit record per block, and the manifest that seals them.

A block without a record is not committed. Records and manifest list every file with its size and SHA-256, contain a
hash of themselves, and are bound to the specification, so that a byte that changed, or that belongs to another archive,
is detected. Nothing in them depends on time, host or process.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from redistill_cache import limits
from redistill_cache.errors import Damaged, Refused
from redistill_cache.layout import Block
from redistill_cache.spec import ADDED_TERMS, TERMS, VERSION, is_name
from redistill_cache.spec_files import parse_version
from redistill_cache.strict_json import Fields, Json, canonical, parse

__all__ = [
    "FileEntry",
    "FileTable",
    "Header",
    "Manifest",
    "Record",
    "parse_files",
    "parse_header",
    "parse_record",
    "sha256",
]

PATH = re.compile(r"[a-z0-9_](?:[a-z0-9_./-]{0,400})")
HEX = re.compile(r"[0-9a-f]{64}")
MANIFEST_FORMAT = "redistill-manifest"
# The minor version of a manifest with `teacher_views` or `terms`, and of one whose terms are more than licence and
# citation; one with neither is of version 1.0.
MINOR = 1
TERMS_MINOR = 2


class FileEntry(NamedTuple):
    """Size and hash of a committed file."""

    size: int
    sha256: str


class FileTable(Mapping[str, FileEntry]):
    """The files of a sealed archive. There may be hundreds of thousands, so entries are created on access."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int], hashes: Sequence[str]) -> None:
        self._indices = {name: index for index, name in enumerate(names)}
        self._sizes, self._hashes = sizes, hashes

    def __getitem__(self, name: str) -> FileEntry:
        index = self._indices[name]
        return FileEntry(self._sizes[index], self._hashes[index])

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __contains__(self, name: object) -> bool:
        return name in self._indices

    def keys(self) -> KeysView[str]:
        return self._indices.keys()


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_path(path: object) -> bool:
    return isinstance(path, str) and bool(PATH.fullmatch(path)) and _stays_inside(path)


def _stays_inside(path: str) -> bool:
    return ".." not in path and "//" not in path


# -- commit records ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """The commit of one block: its files, and the statistics its writer measured."""

    block: Block
    identity: str  # of the archive or, for a block of a teacher, of that teacher
    files: Mapping[str, FileEntry]
    stats: Mapping[str, Json] | None = None

    def to_bytes(self) -> bytes:
        value = {
            "part": self.block.part,
            "view": self.block.view,
            "index": self.block.index,
            "rows": [self.block.start, self.block.stop],
            "identity": self.identity,
            "files": [[path, *self.files[path]] for path in sorted(self.files)],
            "stats": self.stats,
        }
        return canonical(value | {"sha256": sha256(canonical(value))})


def parse_record(data: bytes, block: Block, identity: str, where: str) -> Record:
    """The record of `block`. `Damaged` unless it is byte for byte what a writer of this archive would write."""
    try:
        value = parse(data, cap=limits.MAX_RECORD_BYTES, where=where)
        record = _parse_fields(Fields(value, where), block, identity)
    except Refused as error:
        raise Damaged(f"{error}; the commit record of {block} is damaged") from None
    if record.to_bytes() != data:
        raise Damaged(f"{where}: the commit record of {block} does not match its own hash; it is damaged")
    return record


def _parse_fields(fields: Fields, block: Block, identity: str) -> Record:
    rows = fields.integers("rows", 2)
    if len(rows) != 2:
        fields.refuse("rows", "[start, stop]")
    recorded = Block(
        fields.text("part", 256),
        fields.integer("view", 0, limits.MAX_VIEWS),
        fields.integer("index", 0, limits.MAX_SAMPLES),
        *rows,
    )
    if recorded != block:
        fields.refuse("part", f"of {block}, rows {block.start} to {block.stop}; this is the record of {recorded}")
    if fields.text("identity", 64) != identity:
        fields.refuse("identity", f"{identity[:12]}...: the record belongs to another archive")
    files = {}
    for item in fields.items("files", 4 * limits.MAX_ARRAYS * limits.MAX_SIGNALS):
        path, entry = _parse_file(fields, item)
        files[path] = entry
    stats = None if fields.is_null("stats") else fields.mapping("stats")
    fields.text("sha256", 64)
    fields.done()
    return Record(block, identity, files, stats)


def _parse_file(fields: Fields, item: Json) -> tuple[str, FileEntry]:
    fits = isinstance(item, list) and len(item) == 3 and _is_path(item[0]) and type(item[1]) is int and item[1] >= 0
    if not fits or not isinstance(item[2], str) or not HEX.fullmatch(item[2]):
        fields.refuse("files", "a list of [path, size, sha256]")
    return item[0], FileEntry(item[1], item[2])


# -- the manifest -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """Every file of a sealed archive. `teachers` maps a teacher to the merged statistics of its signals, or {}."""

    identity: str
    views: int
    teachers: Mapping[str, Mapping[str, Json]]
    teacher_views: Mapping[str, int]  # of the teachers with fewer views than the archive
    files: Mapping[str, FileEntry] = field(repr=False)
    terms: Mapping[str, str] = field(default_factory=dict)  # all of TERMS: instead of those of the specification

    def to_bytes(self) -> bytes:
        """One JSON document with one file per line, so that its files can be read without a JSON parser."""
        terms = {name: value for name, value in self.terms.items() if value or name not in ADDED_TERMS}
        minor = MINOR if self.teacher_views or terms else VERSION[1]
        header = {
            "format": MANIFEST_FORMAT,
            "version": f"{VERSION[0]}.{TERMS_MINOR if terms.keys() & set(ADDED_TERMS) else minor}",
            "identity": self.identity,
            "views": self.views,
            "teachers": self.teachers,
        }
        header |= {"teacher_views": dict(self.teacher_views)} if self.teacher_views else {}
        header |= {"terms": terms} if terms else {}
        # Also canonical JSON: no file name needs an escape.
        lines = [f'["{path}",{entry.size},"{entry.sha256}"]' for path, entry in sorted(self.files.items())]
        body = OPEN + canonical(header) + FILES + ",\n".join(lines).encode() + b"\n"
        return body + CLOSE + sha256(body).encode() + END


OPEN, FILES, CLOSE, END = b'{"manifest":', b',"files":[\n', b'],"sha256":"', b'"}\n'
TAIL = len(CLOSE) + 64 + len(END)
# One file: [path, size, hash]. Not a possessive repetition of lines, which Python 3.11.2 gets wrong.
LINE = re.compile(rb'\["([a-z0-9_][a-z0-9_./-]{0,400})",(0|[1-9][0-9]{0,17}),"([0-9a-f]{64})"\](,?)')


@dataclass(frozen=True)
class Header:
    """The part of a manifest before its list of files; `files` is the position of that list in its bytes."""

    identity: str
    views: int
    teachers: Mapping[str, Mapping[str, Json]]
    teacher_views: Mapping[str, int]
    terms: Mapping[str, str]
    files: slice

    @property
    def views_by_teacher(self) -> dict[str, int]:
        """Of every teacher, its leading views."""
        return {name: self.teacher_views.get(name, self.views) for name in self.teachers}


def parse_header(data: bytes, where: str) -> Header:
    """The header of a manifest, after checking the manifest's hash of itself; `Damaged` or `Refused` otherwise."""
    if len(data) > limits.MAX_MANIFEST_BYTES:
        raise Refused(f"{where}: {len(data)} bytes, more than the limit of {limits.MAX_MANIFEST_BYTES}")
    body = memoryview(data)[:-TAIL]
    if data[-TAIL:] != CLOSE + sha256(body).encode() + END:
        raise Damaged(f"{where}: the manifest does not match its own hash; it is damaged")
    start = data.find(FILES, 0, limits.MAX_METADATA_BYTES + len(FILES))
    if not data.startswith(OPEN) or start < 0:
        raise Refused(f"{where}: not a manifest of a redistill archive")
    fields = Fields(parse(data[len(OPEN) : start], cap=limits.MAX_METADATA_BYTES, where=where), where)
    if fields.text("format", 64) != MANIFEST_FORMAT:
        fields.refuse("format", repr(MANIFEST_FORMAT))
    _, minor = parse_version(fields, where)
    teachers = fields.mapping("teachers")
    if len(teachers) > limits.MAX_TEACHERS or not all(isinstance(item, dict) for item in teachers.values()):
        fields.refuse("teachers", f"an object of at most {limits.MAX_TEACHERS} objects, the statistics by teacher")
    if not all(map(is_name, teachers)):  # they become parts of paths
        raise Refused(f"{where}: the manifest has a teacher with an invalid name; it was edited")
    views = fields.integer("views", 1, limits.MAX_VIEWS)
    header = Header(
        identity=fields.text("identity", 64),
        views=views,
        teachers=teachers,
        teacher_views=_parse_teacher_views(fields, teachers, views) if minor >= MINOR else {},
        terms=_parse_terms(fields, where, minor) if minor >= MINOR else {},
        files=slice(start + len(FILES), len(data) - TAIL),
    )
    fields.done(ignore_unknown=minor > TERMS_MINOR)
    return header


def _parse_teacher_views(fields: Fields, teachers: Mapping[str, Json], views: int) -> dict[str, int]:
    if "teacher_views" not in fields:
        return {}
    fewer = fields.mapping("teacher_views")
    if not fewer or not all(name in teachers and type(n) is int and 1 <= n < views for name, n in fewer.items()):
        fields.refuse("teacher_views", f"teachers of this manifest with 1 to {views - 1} views, at least one")
    return fewer


def _parse_terms(fields: Fields, where: str, minor: int) -> dict[str, str]:
    """All of `TERMS`, "" for those that the manifest does not state."""
    if "terms" not in fields:
        return {}
    terms = Fields(fields.mapping("terms"), where)
    optional = ADDED_TERMS if minor >= TERMS_MINOR else ()
    stated = [name for name in TERMS if name not in ADDED_TERMS or (name in optional and name in terms)]
    values = dict.fromkeys(TERMS, "") | {name: terms.text(name, limits.MAX_TEXT) for name in stated}
    terms.done(ignore_unknown=minor > TERMS_MINOR)
    return values


def parse_files(data: bytes, header: Header, where: str, *, most: int = limits.MAX_FILES) -> FileTable:
    """The files of a manifest, whose bytes must be exactly those that a writer produces."""
    start, end = header.files.start, header.files.stop
    count = data.count(b"\n", start, end)
    if count > most:
        raise Damaged(f"{where}: the manifest lists {count} files, its specification allows at most {most}")
    lines = bytes(memoryview(data)[start:end]).split(b"\n")
    names, sizes, hashes = [], [], []
    for index, line in enumerate(lines[:-1]):
        match = LINE.fullmatch(line)
        if match is None or (match[4] == b",") == (index == len(lines) - 2):
            raise Refused(f"{where}: expected one [path, size, sha256] per line, found {line[:60]!a}")
        names.append(match[1].decode())
        sizes.append(int(match[2]))
        hashes.append(match[3].decode())
    if not names or lines[-1]:
        raise Refused(f"{where}: expected one [path, size, sha256] per line, found {lines[-1][:60]!a}")
    if any(a >= b for a, b in itertools.pairwise(names)) or not all(map(_stays_inside, names)):
        raise Refused(f"{where}: its files are not sorted, or a path leads out of the archive")
    return FileTable(names, sizes, hashes)
