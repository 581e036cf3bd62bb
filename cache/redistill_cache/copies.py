"""Copies that hold a part of an archive only: its first views, of all teachers or of some.

Such a copy has the manifest of the whole archive, and so its id. A note beside it says what is here. It is written
before the manifest and removed once everything is here, so that a copy is never taken for more than it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from redistill_cache import layout, limits
from redistill_cache.errors import Refused
from redistill_cache.storage import LOCAL, read_small
from redistill_cache.strict_json import Fields, canonical, parse

__all__ = ["Held", "note_held", "noted", "refuse_partial_copy", "remove_note"]


@dataclass(frozen=True)
class Held:
    """A part of an archive: what is not of a view, and leading views, of some teachers fewer than of others."""

    views: int
    teacher_views: Mapping[str, int] = field(default_factory=dict)
    """Of the teachers with fewer than both `views` and their own in the archive; 0: no row of it."""

    def views_of(self, teacher: str | None) -> int:
        """Of a teacher, or of the view parameters: at most so many."""
        return self.views if teacher is None else self.teacher_views.get(teacher, self.views)

    def files(self, names: Iterable[str]) -> Iterator[str]:
        """Those files of the archive that are of this part."""
        for name in names:
            view = layout.view_of_file(name)
            if view is None or view < self.views_of(layout.teacher_of_file(name) if self.teacher_views else None):
                yield name


def noted(path: Path, identity: str, views: int, teachers: Mapping[str, int]) -> Held | None:
    """What a copy of the archive with this id holds, as its note says; None where there is none.

    `views` and `teachers` are what the archive has: its views, and those of every teacher.
    """
    note = path / layout.COPY
    try:
        data = read_small(note, limits.MAX_RECORD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    fields = Fields(parse(data, cap=limits.MAX_RECORD_BYTES, where=str(note)), str(note))
    if fields.text("id", 64) != identity:
        raise Refused(f"{path} is a copy of another archive than its manifest; fetch it to another folder")
    held = fields.integer("views", 0, views)
    fewer = {}
    if "teacher_views" in fields:
        fewer = fields.mapping("teacher_views")
        fit = (type(n) is int and 0 <= n < min(held, teachers.get(name, 0)) for name, n in fewer.items())
        if not fewer or not all(fit):
            fields.refuse("teacher_views", "teachers with fewer views than the copy and than in the archive")
    fields.done()
    return Held(held, fewer)


def note_held(path: Path, identity: str, held: Held) -> None:
    fewer = {"teacher_views": dict(held.teacher_views)} if held.teacher_views else {}
    LOCAL.make_directories(path / layout.JOURNAL)
    LOCAL.publish(path / layout.COPY, canonical({"id": identity, "views": held.views, **fewer}))


def remove_note(path: Path) -> None:
    """Everything is here."""
    note = path / layout.COPY
    if note.exists():
        LOCAL.remove(note)
        LOCAL.sync_directory(note.parent)


def refuse_partial_copy(path: Path, action: str) -> None:
    if (path / layout.COPY).exists():
        raise Refused(
            f"{path} is a copy that holds a part of its archive only, so {action} is not possible; "
            "fetch the rest with 'redistill archive fetch', without --views and --teachers"
        )
