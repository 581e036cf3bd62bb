"""Commands of `redistill archive` that write an archive to another place: copy and publish."""

from __future__ import annotations

from typing import Annotated

import typer
from redistill_cache.wording import harmless

from redistill_cli.rendering import PATH_OR_URL, Offline, ProgressBar, set_offline

__all__ = ["copy"]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")]


def copy(
    source: Annotated[
        str,
        typer.Argument(
            metavar=PATH_OR_URL, help="The archive, as it is or in packed form; #sha256=ID after it: only this one."
        ),
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="A folder, s3://BUCKET/PATH or gs://BUCKET/PATH.")
    ],
    views: Annotated[
        int | None, typer.Option("--views", min=1, help="Copy the first views only, to a folder. [default: all]")
    ] = None,
    pack: Annotated[
        bool | None,
        typer.Option(
            "--packed/--tree",
            help="Few tars, or the files of the archive. [default: as DESTINATION is named, name.redistill or "
            "name.redistill.zarr; else as the source is]",
            show_default=False,
        ),
    ] = None,
    dry_run: DryRun = False,
    offline: Offline = False,
) -> None:
    """Copy an archive, or its first views, to a folder or a bucket.

    Nothing is taken for an archive before all of it is there: the manifest is
    written last. An interrupted command continues, and sends nothing twice.
    What comes from a server gets to a bucket by way of the cache folder.

    Examples:

    \b
      redistill archive copy teacher.redistill.zarr s3://lab/teacher.redistill
      redistill archive copy https://example.org/r50.redistill /mnt/r50 --views 4
    """
    from redistill_cache.addresses import redact
    from redistill_cache.sending import copy_archive, planned

    set_offline(offline)
    if dry_run:
        contents = planned(source, destination, views=views, pack=pack)
        typer.echo(f"{harmless(redact(destination))}: would get {contents.summary}")
        return
    with ProgressBar(f"copy {redact(source)}", "B") as bar:
        identity = copy_archive(source, destination, views=views, pack=pack, progress=bar.update, notify=bar.write)
    typer.echo(f"{harmless(redact(destination))}: id {identity}")
