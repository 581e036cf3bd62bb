"""Commands of `redistill archive` that make an archive from the contents of others: skeleton, merge and subset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from redistill_cache.wording import harmless, human_bytes

from redistill_cli.options import ArchivePath, split
from redistill_cli.rendering import ProgressBar, note

__all__ = ["merge", "skeleton", "subset"]

DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the cost; write nothing.")]


def skeleton(
    path: ArchivePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New archive, such as share.redistill.zarr.")],
) -> None:
    """Write an archive without blocks, in which another lab writes its share.

    It has the images' keys and digests, the recipe, and the teachers with their
    codecs. Of two labs, one runs cache-teacher with --share 0/2 --no-help on its
    archive, the other one with --out OUT --share 1/2 --no-help on its own copy of
    the images; then redistill archive merge joins both archives.

    Examples:

    \b
      redistill archive skeleton teacher.redistill.zarr share.redistill.zarr
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
      redistill archive merge a.redistill.zarr b.redistill.zarr \\
        --out teacher.redistill.zarr
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


def subset(
    path: ArchivePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New archive, such as small.redistill.zarr.")],
    views: Annotated[
        str | None,
        typer.Option("--views", metavar="K|0,2,5|I:J", help="First views, these, or a span. [default: all]"),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(
            "--rows", metavar="FILE|I:J", help="Rows of a span, or a text file with a row number or key per line."
        ),
    ] = None,
    per_class: Annotated[
        int | None, typer.Option("--per-class", min=1, help="Rows of each class: canaries, then the first ones.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            "--classes", help="Rows of these classes, by name or number. The teacher's logits keep all classes."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write some views and rows of an archive as an archive of their own.

    Stored values are copied, not encoded again: each is that of the archive,
    and within its certified bound. Rows and views have new numbers; the subset
    names the archive it was taken from. It trains on the whole image set, of
    which it uses the images it has. Nothing can be added to it.

    Examples:

    \b
      redistill archive subset teacher.redistill.zarr two.redistill.zarr \\
        --views 2
      redistill archive subset teacher.redistill.zarr few.redistill.zarr \\
        --per-class 20
      redistill archive subset teacher.redistill.zarr cats.redistill.zarr \\
        --classes tabby,tiger --views 0,2,5
    """
    from redistill_cache.errors import UsageError
    from redistill_cache.reader import open_archive
    from redistill_cache.subsets import choose_rows, choose_views, plan_subset, write_subset

    if (views, rows, per_class, classes) == (None,) * 4:
        raise UsageError("nothing to choose; give --views, --rows, --per-class or --classes")
    archive = open_archive(path)
    numbers = tuple(range(archive.num_views)) if views is None else choose_views(views, archive.num_views)
    chosen = choose_rows(archive, rows, split(classes or ""), per_class, numbers)
    plan = plan_subset(archive, out, numbers, chosen)
    what = f"{plan.spec.num_samples:,} of {archive.num_samples:,} samples, {len(numbers)} of {archive.num_views} views"
    if archive.spec.canaries_per_view and not plan.spec.canaries_per_view:
        note("warning: no canary is among these rows, so no images can be compared with them; --per-class keeps some")
    if dry_run:
        typer.echo(f"{harmless(out)}: {what}, about {human_bytes(plan.estimated_bytes)}")
        return
    with ProgressBar(f"write {out}", "block") as bar:
        identity = write_subset(plan, progress=bar.update, notify=bar.write)
    typer.echo(f"{harmless(out)}: id {identity}, {what}")
