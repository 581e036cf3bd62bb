"""The folders of an archive as its writers keep them: complete, durable, swept."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from redistill_cache import layout, limits
from redistill_cache.files import Files, is_leftover
from redistill_cache.spec import ArchiveSpec, TeacherSpec
from redistill_cache.storage import read_small, walk_regular

__all__ = ["Tree"]

KEYS = "samples/key_bytes"  # its zarr.json depends on what is written


@dataclass(frozen=True)
class Tree:
    """The tree of one archive on one disk."""

    root: Path
    files: Files

    def write_metadata(self, spec: ArchiveSpec, teachers: Mapping[str, TeacherSpec]) -> None:
        """Make every folder and zarr.json what the specification says; files that are right are left alone."""
        for folder in (layout.BLOCKS, layout.NOTES, KEYS):
            self.files.make_directories(self.root / folder)
        for name, data in layout.expected_metadata(spec, dict(teachers)).items():
            path = self.root / name
            self.files.make_directories(path.parent)
            if not path.exists() or read_small(path, limits.MAX_METADATA_BYTES) != data:
                self.files.publish(path, data)

    def sync_folders(self, spec: ArchiveSpec, teachers: Mapping[str, TeacherSpec]) -> None:
        """Make every name durable: a writer killed between a rename and its sync has left names that only look so."""
        names = [*layout.expected_metadata(spec, dict(teachers)), *map(layout.teacher_path, teachers)]
        folders = {Path(name).parent for name in names}
        folders |= {Path(layout.BLOCKS), Path(layout.NOTES), Path(KEYS)}
        folders |= {parent for folder in folders for parent in folder.parents}
        for folder in sorted(folders):
            self.files.sync_directory(self.root / folder)
        with contextlib.suppress(PermissionError):  # the archive's own name; its folder may be somebody else's
            self.files.sync_directory(self.root.parent)

    def sweep(self) -> None:
        """Remove what dead writers left half-written; for when every block is committed, so that nobody needs it."""
        for name in walk_regular(self.root, most=4 * limits.MAX_FILES):
            path = self.root / name
            if is_leftover(path):
                with contextlib.suppress(FileNotFoundError):  # another process sweeps as well
                    self.files.remove(path)
