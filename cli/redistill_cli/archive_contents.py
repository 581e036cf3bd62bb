"""Commands of `redistill archive` that make an archive from the contents of others: skeleton, merge and subset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from redistill_cache.wording import harmless, human_bytes

from redistill_cli.options import ArchivePath
from redistill_cli.rendering import ProgressBar, note

__all__ = ["merge", "skeleton"]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the cost; write nothing.")]


def skeleton(
    path: ArchivePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New archive, such as share.redistill.zarr.")],
) -> None:
    """Write an archive without blocks, in which another lab writes its share.

    It has the images' keys and digests, the recipe, and the teachers with their
    codecs. The other lab runs cache-teacher with --out OUT and --no-help on its
    own copy of the images; then redistill archive merge joins both archives.

    Examples:

    \b
      redistill archive skeleton teacher.redistill.zarr share.redistill.zarr
      redistill cache-teacher DATA --teacher TEACHER --out share.redistill.zarr --share 1/2 --no-help
    """
    from redistill_cache.combining import skeleton as write_skeleton

    spec = write_skeleton(path, out, notify=note)
    typer.echo(f"{harmless(out)}: {spec.num_samples:,} samples, {spec.num_views:,} views to be written")


def merge(
    paths: Annotated[list[Path], typer.Argument(metavar="ARCHIVE...", help="Two or more archives, finished or not.")],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="New archive, such as name.redistill.zarr.")],
    dry_run: DryRun = False,
) -> None:
    """Join archives of the same images and views into one.

    It has the blocks and the teachers of all of them, copied as they are. What
    two have must be equal, byte by byte: a difference is named and refused. If
    no block is missing, the archive is finished, and has the id that one run
    would have given it. An interrupted command continues.

    Examples:

    \b
      redistill archive merge lab-a.redistill.zarr lab-b.redistill.zarr --out teacher.redistill.zarr
    """
    from redistill_cache.combining import merge as merge_archives
    from redistill_cache.combining import plan_merge

    plan = plan_merge(paths, out)
    missing = f"{plan.missing:,} blocks are missing, the first is {plan.first_missing}"
    if dry_run:
        typer.echo(
            f"{harmless(out)}: {plan.blocks:,} blocks, {human_bytes(plan.bytes_to_copy)} to copy, teachers "
            f"{', '.join(plan.teachers) or 'none'}; {missing if plan.missing else 'no block is missing'}"
        )
        return
    with ProgressBar(f"merge to {out}", "B") as bar:
        identity = merge_archives(plan, progress=bar.update, notify=bar.write)
    typer.echo(f"{harmless(out)}: " + (f"id {identity}" if identity else f"unfinished: {missing}"))
