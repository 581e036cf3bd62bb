"""`redistill report`: a page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from redistill_cli.rendering import safe


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of cohorts.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
    archive: Annotated[Path | None, typer.Option("--archive", help="Show this archive's card.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Its images: show views with everybody's answers.")] = None,
) -> None:
    """Write one self-contained page about finished runs: accuracy, curves, calibration, classes, views, the archive.

    Runs that differ in nothing but the seed are one line. The page needs no network and no script, and prints well.

    Examples:

      redistill report runs/losses --archive resnet50.redistill.zarr --out losses.html
    """
    from redistill_cache.errors import UsageError

    from redistill.report import write_report

    if data is not None and archive is None:
        raise UsageError("--data shows views of an archive; add --archive")
    write_report(runs, out, archive=archive, data=data)
    typer.echo(f"wrote {safe(out)}")
