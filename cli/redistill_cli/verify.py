"""`redistill verify`: is every byte of an archive the byte that was committed?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from redistill_cache.wording import harmless

from redistill_cli.rendering import archive_at, print_json, progress_line

if TYPE_CHECKING:
    from redistill_cache.verify import VerifyReport

DAMAGED = 4
REFUSED = 3


def verify(
    archive: Annotated[
        str,
        typer.Argument(metavar="ARCHIVE", help="A folder like name.redistill.zarr, or its URL."),
    ],
    full: Annotated[bool, typer.Option("--full", help="Hash every file, also those verified here before.")] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Move damaged blocks aside, so that they can be made again.")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", help="Also prove that this image set gives the views the teacher saw.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check every file of an archive against what was committed; with --data, the views against your images.

    Exit code 0: all is well. 3: the images do not give the archive's views. 4: damaged, every file is named.

    Examples:

      redistill verify teacher.redistill.zarr --full

      redistill verify teacher.redistill.zarr --data folder:imagenet/train
    """
    from redistill_cache import verify as verification

    path = archive_at(archive)
    with progress_line("verify") as progress:
        report = verification.verify(path, full=full, progress=progress)
    moved = verification.quarantine(path, report.damaged) if quarantine and report.damaged else []
    aligned = True
    if data is not None and report.ok:
        alignment = _align(path, data)
        aligned = alignment["verdict"] != "refused"
        report = replace(report, ok=aligned, alignment=alignment)
    if as_json:
        print_json(report.to_json() | {"quarantined": moved})
    else:
        _show(path, report, moved)
    if report.damaged:
        raise typer.Exit(DAMAGED)
    if not aligned:
        raise typer.Exit(REFUSED)


def _align(archive: Path, data: str) -> dict[str, Any]:
    """Re-create the canaries of the archive from the images in `data`."""
    from redistill_cache.reader import open_archive

    from redistill.views.aligned import aligned_views

    alignment = aligned_views(data, open_archive(archive)).alignment
    return alignment.to_json() | {"message": alignment.message}


def _show(archive: Path, report: VerifyReport, moved: list[str]) -> None:
    for item in report.damaged:
        typer.echo(f"damaged: {harmless(item)}", err=True)
    for block in moved:
        typer.echo(f"moved aside: {harmless(block)}", err=True)
    if report.damaged:
        advice = "run the command that wrote the archive again" if moved else "--quarantine lets them be made again"
        typer.echo(f"{harmless(archive)}: {len(report.damaged)} of {report.checked_files} files are damaged; {advice}")
        return
    typer.echo(f"{harmless(archive)}: {report.checked_files} files are what was committed")
    if report.alignment is not None:
        typer.echo(harmless(report.alignment["message"]))
