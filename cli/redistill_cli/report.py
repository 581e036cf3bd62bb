"""`redistill report`: an HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from redistill_cache.wording import harmless

from redistill_cli.rendering import PATH_OR_URL, local_archive


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs, or folders that contain runs.")],
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("report.html"),
    archive: Annotated[
        str | None, typer.Option("--archive", metavar=PATH_OR_URL, help="Archive to describe on the page.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="Images of the archive, to show views with all predictions."),
    ] = None,
) -> None:
    """Write a self-contained HTML page about finished runs.

    Shows accuracy, curves, calibration, classes, views and the archive. Runs
    that differ only in the seed are grouped. The page needs no network and no
    script, and can be printed.

    Examples:

    \b
      redistill report runs/losses --out losses.html

    \b
      redistill report runs/* --archive resnet50.redistill.zarr \\
        --data folder:imagenet/train
    """
    from redistill.report import write_report

    written = write_report(runs, out, archive=local_archive(archive), data=data)
    for note in written.notes:
        typer.echo(f"note: {harmless(note)}", err=True)
    groups = "" if written.runs == written.groups else f" in {written.groups} groups"
    typer.echo(f"wrote {harmless(out)}: {written.runs} {'run' if written.runs == 1 else 'runs'}{groups}")
