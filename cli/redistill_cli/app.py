"""The typer application. Every command is a module of its own."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from redistill_cache.errors import RedistillError
from typer.core import TyperGroup

from redistill_cli.archive import archive
from redistill_cli.cache_teacher import cache_teacher
from redistill_cli.demo import demo
from redistill_cli.doctor import doctor
from redistill_cli.evaluate import evaluate
from redistill_cli.index import index
from redistill_cli.inspect import inspect
from redistill_cli.options import Command
from redistill_cli.report import report
from redistill_cli.train import train
from redistill_cli.verify import verify


class CommandInterrupted(RedistillError):
    """Ctrl-C in a command that has no state to save."""

    exit_code = 130


class Commands(TyperGroup):
    """Turns Ctrl-C into a RedistillError; typer would exit without a message."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  the context of typer's own click, and what a command returns
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise CommandInterrupted("interrupted") from None


app = typer.Typer(
    name="redistill",
    cls=Commands,
    help="Knowledge distillation without paying for the teacher twice.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich reflows examples, drops text in brackets, and cuts option names at 80 columns
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 ok, 1 check failed, 2 usage, 3 refused (data or archive do not match), 4 damaged archive, "
    "130 interrupted.",
)


def show_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        typer.echo(f"redistill {version('redistill')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(cls=Command)(demo)
app.command("cache-teacher", cls=Command)(cache_teacher)
app.command(cls=Command)(train)
app.command(cls=Command)(evaluate)
app.command(cls=Command)(report)
app.command(cls=Command)(index)
app.command(cls=Command)(inspect)
app.command(cls=Command)(verify)
app.command(cls=Command)(doctor)
app.add_typer(archive, name="archive")
