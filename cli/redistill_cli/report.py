"""`redistill report`: a page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from redistill_cache.wording import harmless

from redistill_cli.rendering import PLACE, archive_at


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of cohorts.", metavar="RUN...")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
    archive: Annotated[str | None, typer.Option("--archive", metavar=PLACE, help="Show this archive's card.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Its images: show views with everybody's answers.")] = None,
) -> None:
    """Write one self-contained page about finished runs: accuracy, curves, calibration, classes, views, the archive.

    Runs that differ in nothing but the seed are one line. The page needs no network and no script, and prints well.

    Examples:

      redistill report runs/losses --out losses.html

      redistill report runs/* --archive resnet50.redistill.zarr --data folder:imagenet/train
    """
    from redistill.report import write_report

    written = write_report(runs, out, archive=archive_at(archive), data=data)
    for note in written.notes:
        typer.echo(f"note: {harmless(note)}", err=True)
    groups = "" if written.runs == written.groups else f" in {written.groups} groups"
    typer.echo(f"wrote {harmless(out)}: {written.runs} {'run' if written.runs == 1 else 'runs'}{groups}")
