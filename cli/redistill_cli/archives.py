"""Archives on the command line: a path, or a URL whose archive is fetched once and is a path from then on."""

from __future__ import annotations

from pathlib import Path

from redistill_cli.rendering import progress_line

__all__ = ["PLACE", "archive_at"]

PLACE = "PATH|URL"


def archive_at(text: str) -> Path:
    """Where the archive lies on this machine."""
    from redistill_cache.fetching import fetch_archive, is_url

    if not is_url(text):
        return Path(text)
    with progress_line(f"fetch {text}", unit="B") as progress:
        return fetch_archive(text, progress=progress)
