"""Copies that hold the first views of an archive only.

Such a copy has the manifest of the whole archive, and so its id. A note beside it says how many views are here. It is
written before the manifest and removed once everything is here, so that a copy is never taken for more than it is.
"""

from __future__ import annotations

from pathlib import Path

from redistill_cache import layout, limits
from redistill_cache.errors import Refused
from redistill_cache.storage import LOCAL, read_small
from redistill_cache.strict_json import Fields, canonical, parse

__all__ = ["held_views", "note_views", "refuse_partial_copy", "remove_note"]


def held_views(path: Path, identity: str, views: int) -> int | None:
    """How many of the first views of the archive with this id its copy at `path` holds; None where no note says so."""
    note = path / layout.COPY
    try:
        data = read_small(note, limits.MAX_RECORD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    fields = Fields(parse(data, cap=limits.MAX_RECORD_BYTES, where=str(note)), str(note))
    if fields.text("id", 64) != identity:
        raise Refused(f"{path} is a copy of another archive than its manifest; fetch it to another folder")
    held = fields.integer("views", 0, views)
    fields.done()
    return held


def note_views(path: Path, identity: str, views: int) -> None:
    LOCAL.make_directories(path / layout.JOURNAL)
    LOCAL.publish(path / layout.COPY, canonical({"id": identity, "views": views}))


def remove_note(path: Path) -> None:
    """Everything is here."""
    note = path / layout.COPY
    if note.exists():
        LOCAL.remove(note)
        LOCAL.sync_directory(note.parent)


def refuse_partial_copy(path: Path, action: str) -> None:
    if (path / layout.COPY).exists():
        raise Refused(
            f"{path} is a copy that holds some views of its archive only, so {action} is not possible; "
            "fetch the rest with 'redistill archive fetch', without --views"
        )
