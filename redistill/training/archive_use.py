"""What a run reads of its archive, and when: views that come while it trains.

A resumed run reads the same, even if views or teachers were added in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from redistill_cache import Archive
from redistill_cache.arrivals import Arrivals
from redistill_cache.errors import Refused, SpecMismatch
from redistill_cache.layout import Block, part_blocks, samples_block, side_block
from redistill_cache.spec import LOGITS

from redistill.interrupts import stop_requested
from redistill.progress import Progress
from redistill.ranks import RANK_EXITED, World

__all__ = ["ArchiveUse", "ViewStream"]


@dataclass(frozen=True)
class ArchiveUse:
    """The first `views` views of these teachers, in an archive with the id `archive` when the run began."""

    archive: str
    teachers: tuple[str, ...]
    views: int
    digest: str
    """Of the commit records of all blocks that are read. They hold the hashes of the files, and bind them to the
    specifications of archive and teachers."""

    signals: tuple[str, ...] = ()
    """As TEACHER/SIGNAL: all that are read."""

    @classmethod
    def of(
        cls, archive: Archive, teachers: tuple[str, ...], reads: Sequence[tuple[str, str]], views: int
    ) -> ArchiveUse:
        """`reads` are the signals, each with its teacher."""
        spec, files = archive.spec, archive.state.files
        parts = dict.fromkeys(archive.part_of(*read)[0].name for read in reads)
        blocks: list[Block] = [samples_block(spec), *map(side_block, parts)]
        for part in (["views"] if spec.view_arrays else []) + [f"teachers/{name}" for name in parts]:
            blocks += part_blocks(spec, part, views)
        digest = hashlib.sha256()
        for block in blocks:
            digest.update(f"{block.record_path} {files[block.record_path].sha256}\n".encode())
        return cls(str(archive.id), teachers, views, digest.hexdigest(), tuple(map("/".join, reads)))

    def signals_of(self, teacher: str) -> list[str]:
        """The signals of a teacher that are read."""
        return [signal.partition("/")[2] for signal in self.signals if signal.partition("/")[0] == teacher]

    def require(self, archive: Archive, teachers: tuple[str, ...]) -> ArchiveUse:
        """The same use of the archive as it is now. `Refused` where it no longer has what the run reads."""
        if teachers != self.teachers:
            raise SpecMismatch(
                f"the run was started with the teachers {', '.join(self.teachers)}, found --teacher-names "
                f"{','.join(teachers)}; use the original names to resume, or another --out"
            )
        reads = [(teacher, signal) for teacher, _, signal in (name.partition("/") for name in self.signals)]
        if archive.state.is_partial_copy:
            for teacher, _ in reads:
                archive.teacher(teacher)  # or an error with the command that fetches it
        has = all(teacher in archive.teachers and signal in archive.signals_of(teacher) for teacher, signal in reads)
        views = min([archive.num_views, *(archive.views_of(*read) for read in reads)]) if has else 0
        now = ArchiveUse.of(archive, teachers, reads, self.views) if self.views <= views else None
        if now is None and archive.state.is_partial_copy:
            raise Refused(
                f"{archive.path} is a copy with {views} of the {self.views} views that the run reads; "
                "give the address that it is of as --archive, or fetch the rest"
            )
        if now is None or now.digest != self.digest:
            raise Refused(
                f"the run was trained from archive {self.archive}, --archive {archive.path} is {archive.id} and does "
                "not hold the same views and teachers; use another --out"
            )
        return now

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"teachers": list(self.teachers), "signals": list(self.signals)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ArchiveUse:
        """Runs of earlier versions read the logits of their teachers and nothing else."""
        signals = value.get("signals", [f"{teacher}/{LOGITS}" for teacher in value["teachers"]])
        return cls(**value | {"teachers": tuple(value["teachers"]), "signals": tuple(signals)})


# -- views that come while the run trains -----------------------------------------------------------------------------


class ViewStream:
    """The views of an archive that are fetched while a run trains on those before them."""

    def __init__(self, arrivals: Arrivals, world: World, progress: Progress) -> None:
        self.arrivals, self.world, self.progress = arrivals, world, progress
        self.compare_view: Callable[[int], object] | None = None
        """Refuses a view that does not show what the teacher saw."""
        self.compared: set[int] = set()

    def here(self, views: Sequence[int]) -> bool:
        return all(map(self.arrivals.here, views))

    def wait(self, views: Sequence[int]) -> None:
        """Return when these views are here; say for what it waits, and how far it is."""
        for view in dict.fromkeys(views):
            self.arrivals.wait(
                view,
                notify=self.progress.info,
                watch=partial(self.progress.advance, f"fetch view {view}"),
                stopped=self._stopped,
            )

    def expect(self, views: Sequence[int]) -> None:
        """Fetch these views ahead of use. One rank of a machine does."""
        if self.world.rank.local_rank == 0:
            self.arrivals.expect(dict.fromkeys(views))

    def compare(self, views: Sequence[int]) -> None:
        """Compare the canaries of views, once each, before they are trained on."""
        if self.compare_view is None:
            return
        for view in dict.fromkeys(views):
            if view not in self.compared:
                self.compare_view(view)
                self.compared.add(view)

    def close(self) -> None:
        self.arrivals.close()

    def _stopped(self) -> bool:
        if self.world.heartbeat is not None and self.world.heartbeat.lost.is_set():
            raise Refused(RANK_EXITED)
        return stop_requested()
