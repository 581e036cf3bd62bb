"""What a run reads of its archive. A resumed run reads the same, even if views or teachers were added in between."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from redistill_cache import Archive
from redistill_cache.errors import Refused, SpecMismatch
from redistill_cache.layout import Block, part_blocks, samples_block, side_block

__all__ = ["ArchiveUse"]


@dataclass(frozen=True)
class ArchiveUse:
    """The first `views` views of these teachers, in an archive with the id `archive` when the run began."""

    archive: str
    teachers: tuple[str, ...]
    views: int
    digest: str
    """Of the commit records of all blocks that are read. They hold the hashes of the files, and bind them to the
    specifications of archive and teachers."""

    @classmethod
    def of(cls, archive: Archive, teachers: tuple[str, ...], views: int) -> ArchiveUse:
        spec, files = archive.spec, archive.state.files
        blocks: list[Block] = [samples_block(spec), *map(side_block, teachers)]
        for part in (["views"] if spec.view_arrays else []) + [f"teachers/{name}" for name in teachers]:
            blocks += part_blocks(spec, part, views)
        digest = hashlib.sha256()
        for block in blocks:
            digest.update(f"{block.record_path} {files[block.record_path].sha256}\n".encode())
        return cls(str(archive.id), teachers, views, digest.hexdigest())

    def require(self, archive: Archive, teachers: tuple[str, ...]) -> ArchiveUse:
        """The same use of the archive as it is now. `Refused` where it no longer has what the run reads."""
        if teachers != self.teachers:
            raise SpecMismatch(
                f"the run was started with the teachers {', '.join(self.teachers)}, found --teacher-names "
                f"{','.join(teachers)}; use the original names to resume, or another --out"
            )
        has = set(teachers) <= archive.teachers.keys() and self.views <= min(
            [archive.num_views, *map(archive.views_of, teachers)]
        )
        now = ArchiveUse.of(archive, teachers, self.views) if has else None
        if now is None or now.digest != self.digest:
            raise Refused(
                f"the run was trained from archive {self.archive}, --archive {archive.path} is {archive.id} and does "
                "not hold the same views and teachers; use another --out"
            )
        return now

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"teachers": list(self.teachers)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ArchiveUse:
        return cls(**value | {"teachers": tuple(value["teachers"])})
