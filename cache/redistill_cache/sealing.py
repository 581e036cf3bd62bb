"""The manifest of an archive that is complete: every file with its hash, every signal with what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from redistill_cache import layout, limits
from redistill_cache.errors import Refused
from redistill_cache.fidelity import merge_stats
from redistill_cache.journal import FILES, FileEntry, Manifest, Record, sha256
from redistill_cache.spec import ArchiveSpec, TeacherSpec, archive_identity

__all__ = ["check_manifest", "make_manifest"]


def make_manifest(
    spec: ArchiveSpec, teachers: Mapping[str, TeacherSpec], records: Sequence[Record], views: int
) -> Manifest:
    """A pure function of the specification and of what was committed."""
    contents = layout.expected_metadata(spec, dict(teachers))
    contents["zarr.json"] = layout.root_metadata(spec)
    for name, teacher in teachers.items():
        contents[layout.teacher_path(name)] = layout.teacher_metadata(teacher)
    contents |= {record.block.record_path: record.to_bytes() for record in records}
    files = {path: FileEntry(len(data), sha256(data)) for path, data in contents.items()}
    for record in records:
        files |= record.files
    stats = {
        name: merge_stats(teacher, [r.stats for r in records if r.block.part == f"teachers/{name}"])
        for name, teacher in teachers.items()
    }
    return Manifest(archive_identity(spec.to_json()), views, stats, files)


def check_manifest(data: bytes) -> None:
    """A manifest that would be refused when it is read must not be written: its header holds all statistics."""
    header = data.index(FILES)
    if header > limits.MAX_METADATA_BYTES or len(data) > limits.MAX_MANIFEST_BYTES:
        raise Refused(
            f"the manifest would take {len(data)} bytes, {header} of them statistics; the limits are "
            f"{limits.MAX_MANIFEST_BYTES} and {limits.MAX_METADATA_BYTES}: use fewer teachers or signals in one archive"
        )
