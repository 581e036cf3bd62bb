"""`redistill archive`: change, fetch or pack an archive without running a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from redistill_cache.errors import UsageError
from redistill_cache.wording import harmless, human_bytes

from redistill_cli.options import Command
from redistill_cli.rendering import PATH_OR_URL, Offline, ProgressBar, held_views, set_offline

__all__ = ["archive"]

archive = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
ArchivePath = Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Path such as name.redistill.zarr.")]


@archive.callback()
def group() -> None:
    """Change, fetch or pack an archive without running a teacher.

    Examples:

    \b
      redistill archive fetch https://example.org/r50.redistill r50 --views 4
      redistill archive pack teacher.redistill.zarr teacher.redistill
      redistill archive remove-teacher teacher.redistill.zarr resnet18
      redistill archive edit teacher.redistill.zarr --licence CC-BY-4.0
    """


@archive.command("remove-teacher", cls=Command)
def remove_teacher(
    path: ArchivePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Teacher, as shown by redistill inspect.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a teacher from an archive, and free its bytes.

    Signals that were added to the teacher later are removed with it. The
    other teachers and the views stay as they are; the archive gets another
    id. An interrupted removal is finished by the same command.

    Examples:

    \b
      redistill archive remove-teacher teacher.redistill.zarr resnet18
    """
    from redistill_cache.writer import ArchiveWriter

    writer = ArchiveWriter.resume(path)
    size = human_bytes(writer.teacher_bytes(name))
    added = [signal.name for part in writer.additions(name) for signal in writer.teachers[part].signals]
    what = f"teacher {name}" + (f" with the signals added to it ({', '.join(added)})" if added else "")
    if not yes and not typer.confirm(f"Remove {what} and its {size} from {harmless(path)}?"):
        raise typer.Exit(1)
    writer.remove_teacher(name)
    typer.echo(f"{harmless(path)}: removed {what}, {size} freed")


@archive.command(cls=Command)
def edit(
    path: ArchivePath,
    licence: Annotated[str | None, typer.Option("--licence", metavar="SPDX", help="Licence of the archive.")] = None,
    citation: Annotated[str | None, typer.Option("--citation", metavar="TEXT", help="How to cite it.")] = None,
) -> None:
    """Set the licence or the citation of a finished archive.

    No block changes; the archive gets another id.

    Examples:

    \b
      redistill archive edit teacher.redistill.zarr --licence CC-BY-4.0
    """
    from redistill_cache.writer import ArchiveWriter

    terms = {name: value for name, value in (("licence", licence), ("citation", citation)) if value is not None}
    if not terms:
        raise UsageError("nothing to change; give --licence or --citation")
    identity = ArchiveWriter.resume(path).edit_terms(**terms)
    typer.echo(f"{harmless(path)}: id {identity}")


@archive.command(cls=Command)
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


@archive.command(cls=Command)
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
    offline: Offline = False,
) -> None:
    """Fetch an archive, or its first views, and print where it is.

    Every file is checked. A copy with some of the views has the id of the
    archive and offers exactly what it holds; the same command with more views,
    or without --views, fetches what it lacks. An interrupted command continues.

    Examples:

    \b
      redistill archive fetch https://example.org/r50.redistill r50 --views 4
      redistill archive fetch https://example.org/r50.redistill r50
    """
    from redistill_cache.fetching import fetch_archive, locate
    from redistill_cache.reader import open_archive

    set_offline(offline)
    with ProgressBar(f"fetch {locate(source)}", "B") as bar:
        path = fetch_archive(source, out, views=views, progress=bar.update, notify=bar.write)
    state = open_archive(path).state
    typer.echo(f"{harmless(path)}: id {state.id}, {held_views(state.num_views, state.sealed_views)}")
