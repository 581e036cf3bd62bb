"""redistill_cache: the archive of teacher outputs. numpy and zarr only; no torch."""

from __future__ import annotations

from redistill_cache.fetching import fetch_archive
from redistill_cache.reader import Archive, open_archive, stream_archive
from redistill_cache.rows import PackedView, ViewLoader
from redistill_cache.spec import ArchiveSpec, ArraySpec, SignalSpec, TeacherSpec
from redistill_cache.writer import ArchiveWriter

__all__ = [
    "Archive",
    "ArchiveSpec",
    "ArchiveWriter",
    "ArraySpec",
    "PackedView",
    "SignalSpec",
    "TeacherSpec",
    "ViewLoader",
    "fetch_archive",
    "open_archive",
    "stream_archive",
]
