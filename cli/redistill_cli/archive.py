"""`redistill archive`: change, combine, publish or fetch archives without running a teacher."""

from __future__ import annotations

from typing import Annotated

import typer
from redistill_cache.errors import UsageError
from redistill_cache.spec import TERMS
from redistill_cache.wording import harmless, human_bytes

from redistill.caching.options import CacheOptions
from redistill.sharing.terms import checked_terms
from redistill_cli.archive_cache import cache
from redistill_cli.archive_card import card, sign
from redistill_cli.archive_contents import merge, skeleton, subset
from redistill_cli.archive_interchange import export, import_source
from redistill_cli.archive_publish import copy, publish
from redistill_cli.archive_transport import fetch, pack
from redistill_cli.options import ArchivePath, Command, collect, takes

__all__ = ["archive"]

archive = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@archive.callback()
def group() -> None:
    """Change, combine, publish or fetch archives without running a teacher.

    Examples:

    \b
      redistill archive fetch https://example.org/r50.redistill r50 --views 4
      redistill archive edit teacher.redistill.zarr --licence CC-BY-4.0
      redistill archive publish teacher.redistill.zarr hf://datasets/lab/r50
      redistill archive merge a.redistill.zarr b.redistill.zarr --out c.redistill.zarr
      redistill archive subset teacher.redistill.zarr two.redistill.zarr --views 2
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
@takes(CacheOptions, only=TERMS)
def edit(*, path: ArchivePath, **values: str | None) -> None:
    """Set licences, citation and source of the images of a finished archive.

    No block changes; the archive gets another id. An empty text removes what
    was stated.

    Examples:

    \b
      redistill archive edit teacher.redistill.zarr --licence CC-BY-4.0

    \b
      redistill archive edit teacher.redistill.zarr \\
        --data-source 'ImageNet-1k, ILSVRC 2012' \\
        --data-licence LicenseRef-ImageNet
    """
    from redistill_cache.writer import ArchiveWriter

    terms = collect(CacheOptions, values)
    if not terms:
        raise UsageError("nothing to change; give --licence or --citation, or another option of 'archive edit --help'")
    identity = ArchiveWriter.resume(path).edit_terms(**checked_terms(terms))
    typer.echo(f"{harmless(path)}: id {identity}")


archive.command(cls=Command)(pack)
archive.command(cls=Command)(fetch)
archive.command(cls=Command)(card)
archive.command(cls=Command)(sign)
archive.command(cls=Command)(skeleton)
archive.command(cls=Command)(merge)
archive.command(cls=Command)(subset)
archive.command(cls=Command)(copy)
archive.command(cls=Command)(publish)
archive.command("import", cls=Command)(import_source)
archive.command(cls=Command)(export)
archive.add_typer(cache, name="cache")
