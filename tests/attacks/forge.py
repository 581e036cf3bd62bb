"""Forge an archive: change it, and rewrite records, metadata and manifest to agree with the change.

An attacker has the source of this library, so these functions use it. A forged archive is
consistent except for the change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd
from redistill_cache import layout
from redistill_cache.errors import RedistillError
from redistill_cache.journal import FileEntry, Manifest, Record, parse_files, parse_header, sha256
from redistill_cache.layout import ArrayLayout, all_blocks, expected_files
from redistill_cache.shards import encode_shard
from redistill_cache.spec import ArchiveSpec, TeacherSpec, archive_identity, teacher_identity
from redistill_cache.spec_files import parse_archive_spec, parse_teacher_spec
from redistill_cache.strict_json import canonical

__all__ = ["Change", "documents", "edit", "edit_teacher", "forge", "parsed", "put_rows", "repeated_shard", "reseal"]

Json = Any
Change = Callable[[dict[str, Json]], object]
MANIFEST = layout.MANIFEST
# If a forged specification needs more files than this, none are added.
MOST_FILES = 2000


def read(file: Path) -> Json:
    return json.loads(file.read_bytes())


def read_manifest(path: Path) -> Manifest:
    data = (path / MANIFEST).read_bytes()
    header = parse_header(data, "forged")
    return Manifest(
        header.identity, header.views, header.teachers, header.teacher_views, parse_files(data, header, "forged")
    )


def documents(path: Path) -> tuple[dict[str, Json], dict[str, dict[str, Json]]]:
    """The specifications in an archive, as plain JSON: its own, and its teachers' by name."""
    root = read(path / "zarr.json")["attributes"]["redistill"]
    teachers = {
        file.parent.name: read(file)["attributes"]["redistill_teacher"] for file in path.glob("teachers/*/zarr.json")
    }
    return root, teachers


def parsed(root: Mapping[str, Json], teachers: Mapping[str, Json]) -> tuple[ArchiveSpec, dict[str, TeacherSpec]] | None:
    """The specifications as parsed by the library; None if it refuses them."""
    try:
        spec = parse_archive_spec(root, "forged")
        specs = {name: parse_teacher_spec(item, "forged", spec.block_rows) for name, item in teachers.items()}
        layout.check_extent(spec, specs)
    except RedistillError:
        return None
    fits = layout.count_files(spec, specs, spec.num_views) <= MOST_FILES
    return (spec, specs) if fits and all(item.name == name for name, item in specs.items()) else None


def edit(path: Path, change: Change) -> None:
    root, teachers = documents(path)
    change(root)
    forge(path, root, teachers)


def edit_teacher(path: Path, change: Change, name: str = "net") -> None:
    root, teachers = documents(path)
    change(teachers[name])
    forge(path, root, teachers)


def forge(path: Path, root: dict[str, Json], teachers: dict[str, dict[str, Json]], **header: object) -> None:
    """Write these specifications and everything derived from them. Missing shards become empty files."""
    write(path / "zarr.json", group({"redistill": root}))
    for name, value in teachers.items():
        write(path / layout.teacher_path(name), group({"redistill_teacher": value}))
    accepted = parsed(root, teachers)
    if accepted is None:
        return reseal(path, **header)
    spec, specs = accepted
    for name, data in layout.expected_metadata(spec, specs).items():
        write(path / name, data)
    identity = archive_identity(root)
    for block, names in all_blocks(spec, specs, spec.num_views):
        for name in names:
            if not (path / name).exists():
                write(path / name, b"")
        owner = block.part.split("/")[1] if block.part.startswith("teachers/") else None
        bound = identity if owner is None else teacher_identity(identity, teachers[owner])
        old = path / block.record_path
        stats = read(old)["stats"] if old.exists() else None
        write(old, Record(block, bound, entries(path, names), stats).to_bytes())
    files = entries(path, expected_files(spec, specs, spec.num_views))
    honest: dict[str, Any] = {"identity": identity, "views": spec.num_views, "teacher_views": {}, "files": files}
    stats_of = read_manifest(path).teachers
    honest["teachers"] = {name: stats_of.get(name, {}) for name in specs}
    write(path / MANIFEST, Manifest(**honest | header).to_bytes())
    return None


def reseal(path: Path, **header: object) -> None:
    """Rewrite manifest and records to agree with the current files."""
    for record in sorted((path / layout.BLOCKS).glob("*.json")):
        value = read(record)
        value["files"] = [
            [name, *entry] for name, entry in sorted(entries(path, [f[0] for f in value["files"]]).items())
        ]
        del value["sha256"]
        record.write_bytes(canonical(value | {"sha256": sha256(canonical(value))}))
    manifest = read_manifest(path)
    try:
        identity = archive_identity(documents(path)[0])
    except (ValueError, LookupError, TypeError, RecursionError):
        identity = manifest.identity
    honest: dict[str, Any] = {
        "identity": identity,
        "views": manifest.views,
        "teachers": manifest.teachers,
        "teacher_views": manifest.teacher_views,
        "files": entries(path, manifest.files),
    }
    write(path / MANIFEST, Manifest(**honest | header).to_bytes())


def entries(path: Path, names: Sequence[str] | set[str] | Mapping[str, object]) -> dict[str, FileEntry]:
    result = {}
    for name in sorted(names):
        if (path / name).is_file():
            data = (path / name).read_bytes()
            result[name] = FileEntry(len(data), sha256(data))
    return result


def group(attributes: Json) -> bytes:
    return canonical({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


# -- shards -----------------------------------------------------------------------------------------------------------


def put_rows(path: Path, array: ArrayLayout, rows: np.ndarray, view: int = 0) -> None:
    """Replace the rows of a shard, encoded correctly."""
    (path / array.shard_path(view, 0)).write_bytes(encode_shard(array, rows))


def shard_of(frames: Sequence[bytes], chunks: int | None = None) -> bytes:
    """A shard of these chunks, back to back, with a correct index; chunks after them are absent."""
    sizes = np.array([len(frame) for frame in frames], "<u8")
    entries = np.full((chunks or len(frames), 2), 2**64 - 1, "<u8")
    entries[: len(frames)] = np.stack([np.cumsum(sizes) - sizes, sizes], 1)
    index = entries.tobytes()
    return b"".join(frames) + index + google_crc32c.value(index).to_bytes(4, "little")


def repeated_shard(array: ArrayLayout) -> bytes:
    """A shard of zeros, however large, made of one compressed chunk."""
    frame = bytes(zstd.Zstd(level=3, checksum=True).encode(bytes(array.chunk_bytes)))
    return shard_of([frame] * array.chunks_per_shard)
