"""Commands of `redistill archive` that write an archive to another place: copy and publish."""

from __future__ import annotations

from typing import Annotated

import typer
from redistill_cache.wording import harmless

from redistill_cli.options import ArchivePath
from redistill_cli.rendering import PATH_OR_URL, Offline, ProgressBar, set_offline

__all__ = ["copy", "publish"]

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
      redistill archive copy r50.redistill.zarr s3://lab/r50.redistill
      redistill archive copy https://host/r50.redistill /mnt/r50 --views 4
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


def publish(
    path: ArchivePath,
    destination: Annotated[
        str,
        typer.Argument(
            metavar="DESTINATION", help="hf://datasets/ORG/NAME[/PATH], s3://BUCKET/PATH, gs://BUCKET/PATH or a folder."
        ),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository of the hub as a private one.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace another archive that is there; the hub keeps it under its tag.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Publish a finished archive in packed form, and print its address.

    The archive must state its licence, the source of its images and a
    citation; every byte of it is checked before anything is sent. On the hub,
    all files appear by one commit, which gets a tag. An interrupted command
    continues, and sends nothing twice.

    Examples:

    \b
      redistill archive publish r50.redistill.zarr s3://lab/r50.redistill
      redistill archive publish r50.redistill.zarr hf://datasets/me/r50
    """
    from redistill_cache.addresses import redact
    from redistill_cache.errors import Refused

    from redistill.sharing import publishing

    if dry_run:
        planned = publishing.plan(path, destination)
        typer.echo(f"{harmless(redact(destination))}: would get {planned.contents.summary}, and the card")
        if planned.advice:
            raise Refused(planned.advice)
        return
    with ProgressBar(f"verify {path}", "item") as check, ProgressBar(f"publish {path}", "B") as bar:
        address = publishing.publish(
            path,
            destination,
            private=private,
            replace=replace,
            checked=check.update,
            progress=bar.update,
            notify=bar.write,
        )
    typer.echo(f"published; others use it by this address, and get no other archive from it:\n{harmless(address)}")
