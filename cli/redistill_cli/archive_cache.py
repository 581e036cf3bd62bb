"""`redistill archive cache`: the archives in the cache folder."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from redistill_cache.errors import UsageError
from redistill_cache.wording import counted, harmless, human_bytes
from rich.table import Table

from redistill_cli.options import Command
from redistill_cli.rendering import console, print_json

if TYPE_CHECKING:
    from redistill_cache.cached_archives import CachedArchive

__all__ = ["cache"]

cache = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@cache.callback()
def group() -> None:
    """List and remove the archives that were fetched to the cache folder.

    REDISTILL_CACHE_LIMIT=200GB limits what they take: before an archive is
    fetched, those that were used least are removed, none that is in use.

    Examples:

    \b
      redistill archive cache list
      redistill archive cache prune --max-size 20GB
    """


@cache.command("list", cls=Command)
def list_archives(as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """List the archives in the cache folder, the least used first.

    Examples:

    \b
      redistill archive cache list
    """
    from redistill_cache.cached_archives import cache_limit, cached_archives
    from redistill_cache.verified_files import cache_folder

    archives, most = cached_archives(), cache_limit()
    if as_json:
        rows = [
            {
                "archive": archive.name,
                "id": archive.id,
                "views_held": None if archive.held is None else archive.held.views,
                "lacking": {} if archive.held is None else dict(archive.held.teacher_views),
                "views": archive.views,
                "bytes": archive.nbytes,
                "last_used": time_of(archive),
                "in_use": archive.in_use,
            }
            for archive in archives
        ]
        print_json({"folder": str(cache_folder()), "limit": most, "archives": rows})
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("archive", "id", "views", "size", "last used"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for archive in archives:
        views = "not finished"
        if archive.held is not None:
            fewer = (f", {harmless(name)} {count}" for name, count in archive.held.teacher_views.items())
            views = f"{archive.held.views} of {archive.views}{''.join(fewer)}"
        used = "in use" if archive.in_use else time_of(archive)
        table.add_row(harmless(archive.name), archive.id[:12], views, human_bytes(archive.nbytes), used)
    if archives:
        console.print(table)
    total = human_bytes(sum(archive.nbytes for archive in archives))
    limit = "" if most is None else f", of {human_bytes(most)} that REDISTILL_CACHE_LIMIT allows"
    typer.echo(f"{harmless(cache_folder() / 'archives')}: {counted(len(archives), 'archive')}, {total}{limit}")


@cache.command(cls=Command)
def prune(
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size", metavar="SIZE", help="Such as 20GB; 0 removes all. [default: REDISTILL_CACHE_LIMIT]"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove the archives that were used least from the cache folder.

    Only as many as the size requires, and none that a command uses or
    fetches. A removed archive is fetched again when it is needed.

    Examples:

    \b
      redistill archive cache prune --max-size 20GB
      redistill archive cache prune --max-size 0 --yes
    """
    from redistill_cache.cached_archives import LIMIT, cache_limit, cached_archives, parse_bytes, remove, to_remove

    most = cache_limit() if max_size is None else parse_bytes(max_size, "--max-size")
    if most is None:
        raise UsageError(f"prune needs the size that the archives may have: --max-size 20GB, or {LIMIT}")
    archives = cached_archives()
    chosen = to_remove(archives, sum(archive.nbytes for archive in archives) - most)
    size = human_bytes(sum(archive.nbytes for archive in chosen))
    if chosen and not yes:
        for archive in chosen:
            typer.echo(f"{harmless(archive.name)} {archive.id[:12]}, last used {time_of(archive)}")
        if not typer.confirm(f"Remove {counted(len(chosen), 'archive')}, {size}?"):
            raise typer.Exit(1)
    removed = [archive for archive in chosen if remove(archive)]
    for archive in removed:
        typer.echo(f"removed {harmless(archive.name)} {archive.id[:12]}, {human_bytes(archive.nbytes)}")
    kept = [archive for archive in archives if archive not in removed]
    total = sum(archive.nbytes for archive in kept)
    in_use = f"; more than {human_bytes(most)}, as they are in use" if total > most else ""
    typer.echo(f"kept {counted(len(kept), 'archive')}, {human_bytes(total)}{in_use}")


def time_of(archive: CachedArchive) -> str:
    return datetime.fromtimestamp(archive.used).astimezone().isoformat(" ", "seconds")
