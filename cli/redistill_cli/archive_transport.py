"""Commands of `redistill archive` that move archives: pack and fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from redistill_cache.wording import harmless, human_bytes

from redistill_cli.options import ArchivePath, split
from redistill_cli.rendering import PATH_OR_URL, Offline, ProgressBar, held_part, set_offline

__all__ = ["fetch", "pack"]


def pack(
    path: ArchivePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder such as name.redistill.")],
) -> None:
    """Write the packed form of a finished archive: one tar per view.

    It is for hosts that limit the number of files. Commands that take an
    archive take its address or path in this form as well. The bytes follow
    from the archive, and an interrupted command continues.

    Examples:

    \b
      redistill archive pack teacher.redistill.zarr teacher.redistill
    """
    from redistill_cache.packing import pack as write_packed

    with ProgressBar(f"pack {path}", "B") as bar:
        files = write_packed(path, out, progress=bar.update, notify=bar.write)
    typer.echo(f"{harmless(out)}: {len(files)} files, {human_bytes(sum(files.values()))}")


def fetch(
    source: Annotated[
        str,
        typer.Argument(
            metavar=PATH_OR_URL, help="The archive, as it is or in packed form; #sha256=ID after it: only this one."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="Folder such as name.redistill.zarr. [default: in the cache folder]"),
    ] = None,
    views: Annotated[
        int | None, typer.Option("--views", min=1, help="Fetch the first views only. [default: all]")
    ] = None,
    teachers: Annotated[
        str | None,
        typer.Option("--teachers", metavar="A,B", help="Fetch the rows of these teachers only. [default: all]"),
    ] = None,
    offline: Offline = False,
) -> None:
    """Fetch an archive, or some views or teachers of it, and print where it is.

    Every file is checked. A copy with a part of the archive has its id and
    offers exactly what it holds; the same command with other views or
    teachers, or without these options, adds what it lacks. An interrupted
    command continues.

    Examples:

    \b
      redistill archive fetch https://example.org/r50.redistill r50 --views 4
      redistill archive fetch hf://datasets/lab/three three --teachers vit,r50
      redistill archive fetch https://example.org/r50.redistill r50
    """
    from redistill_cache.fetching import fetch_archive, locate
    from redistill_cache.reader import open_archive

    set_offline(offline)
    with ProgressBar(f"fetch {locate(source)}", "B") as bar:
        names = None if teachers is None else split(teachers)
        path = fetch_archive(source, out, views=views, teachers=names, progress=bar.update, notify=bar.write)
    state = open_archive(path).state
    typer.echo(f"{harmless(path)}: id {state.id}, {held_part(state.num_views, state.sealed_views, state.lacking)}")
