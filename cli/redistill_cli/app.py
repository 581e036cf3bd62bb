"""The typer application: one module per command, each registered here."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from redistill_cache.errors import RedistillError
from typer.core import TyperGroup

from redistill_cli.cache_teacher import cache_teacher
from redistill_cli.demo import demo
from redistill_cli.doctor import doctor
from redistill_cli.evaluate import evaluate
from redistill_cli.inspect import inspect
from redistill_cli.report import report
from redistill_cli.train import train
from redistill_cli.verify import verify


class Stopped(RedistillError):
    """Ctrl-C where nothing was to be kept."""

    exit_code = 130


class Commands(TyperGroup):
    """Says so when a command is interrupted, as typer would leave without a word."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  a context of the click that typer brings; what a command returns
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped("interrupted") from None


app = typer.Typer(
    name="redistill",
    cls=Commands,
    help="Knowledge distillation without paying for the teacher twice.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 the answer is no, 2 usage, 3 refused (data or archive do not fit), "
    "4 damaged archive, 130 interrupted.",
)


def show_version(wanted: bool) -> None:
    if wanted:
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


app.command()(demo)
app.command("cache-teacher")(cache_teacher)
app.command()(train)
app.command()(evaluate)
app.command()(report)
app.command()(inspect)
app.command()(verify)
app.command()(doctor)
