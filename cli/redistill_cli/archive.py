"""`redistill archive`: change, fetch or pack an archive without running a teacher."""

from __future__ import annotations

from typing import Annotated

import typer
from redistill_cache.errors import UsageError
from redistill_cache.wording import harmless, human_bytes

from redistill_cli.archive_cache import cache
from redistill_cli.archive_transport import fetch, pack
from redistill_cli.options import ArchivePath, Command

__all__ = ["archive"]

archive = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@archive.callback()
def group() -> None:
    """Change, fetch or pack an archive without running a teacher.

    Examples:

    \b
      redistill archive fetch https://example.org/r50.redistill r50 --views 4
      redistill archive pack teacher.redistill.zarr teacher.redistill
      redistill archive cache list
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


archive.command(cls=Command)(pack)
archive.command(cls=Command)(fetch)
archive.add_typer(cache, name="cache")
