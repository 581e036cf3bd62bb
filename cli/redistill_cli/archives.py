"""Archives on the command line: a path, or a URL whose archive is fetched once and is a path from then on."""

from __future__ import annotations

from pathlib import Path
from typing import overload

from redistill_cli.rendering import progress_line

__all__ = ["PLACE", "archive_at"]

PLACE = "PATH|URL"


@overload
def archive_at(text: str) -> Path: ...
@overload
def archive_at(text: None) -> None: ...
def archive_at(text: str | None) -> Path | None:
    """Where the archive lies on this machine."""
    from redistill_cache.fetching import fetch_archive, is_url

    if text is None or not is_url(text):
        return None if text is None else Path(text)
    with progress_line(f"fetch {text}", unit="B") as progress:
        return fetch_archive(text, progress=progress)
