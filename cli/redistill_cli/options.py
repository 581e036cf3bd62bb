"""Command-line options: derived from the fields of an options dataclass, where they are defined; given once each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING
from inspect import Parameter
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypeVar, cast

import typer
from redistill_cache.errors import UsageError
from typer.core import TyperCommand

from redistill.option_fields import Option, options_of

__all__ = ["ArchivePath", "Command", "collect", "split", "takes"]

ArchivePath = Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Path such as name.redistill.zarr.")]
Function = TypeVar("Function", bound=Callable[..., None])


def takes(options: type, *, require: bool = True, only: Collection[str] = ()) -> Callable[[Function], Function]:
    """Give a command the options of a dataclass, in place of its `**` parameter and before its own parameters.

    An option that is not on the command line is None, so that a preset or a file can set it. Without `require`, no
    option is required. With `only`, these fields are the options.
    """

    def decorate(command: Function) -> Function:
        own = inspect.signature(command, eval_str=True).parameters.values()
        chosen = [option for name, option in options_of(options).items() if not only or name in only]
        derived = [parameter(option, require) for option in chosen if option.help]
        signature = inspect.Signature([*derived, *(p for p in own if p.kind is Parameter.KEYWORD_ONLY)])
        cast("Any", command).__signature__ = signature  # where typer looks for parameters
        return command

    return decorate


def parameter(option: Option, require: bool) -> Parameter:
    """An option as a parameter of a typer command."""
    required = require and option.default is MISSING
    default = ... if required else None
    text = option.help + describe_default(option)
    if option.positional:
        info = typer.Argument(default, metavar=option.flag, help=text, show_default=False)
    else:
        info = typer.Option(default, spelling(option), metavar=metavar(option), help=text, show_default=False)
    return Parameter(option.field, Parameter.KEYWORD_ONLY, default=info, annotation=annotation(option))


def spelling(option: Option) -> str:
    """The flag; with a --no- form for a switch that is not off by default."""
    negatable = option.type.kind is bool and option.default is not False
    return f"{option.flag}/--no-{option.flag[2:]}" if negatable else option.flag


def metavar(option: Option) -> str | None:
    kind, several, choices = option.type
    return option.metavar or "|".join(choices) or (f"<{kind.__name__}>" if several else None)


def annotation(option: Option) -> object:
    kind, several, _ = option.type
    if option.commas or (kind is Path and option.metavar):  # split by collect; a Path would break a URL
        return str
    return GenericAlias(list, (kind,)) if several else kind


def describe_default(option: Option) -> str:
    value = option.default
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    elif isinstance(value, float):
        value = f"{value:g}"
    elif value is True:
        value = option.flag[2:]
    elif value in (None, MISSING) or value is False:
        value = ""
    text = value if value != "" else option.default_text
    return f" [default: {text}]" if text != "" else ""


def collect(options: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a dataclass that are on the command line, by field."""
    result = {}
    for name, option in options_of(options).items():
        value = values.get(name)
        if option.commas and value is not None:
            value = split_commas(option, value)
        if value is not None and value not in ([], ()):
            result[name] = value
    return result


def split_commas(option: Option, text: str) -> list[Any]:
    try:
        return [option.type.kind(part) for part in split(text)]
    except ValueError:
        raise UsageError(f"{option.flag} takes numbers separated by commas, found {text!r}") from None


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


class Command(TyperCommand):
    """Refuses an option that is given twice and takes one value; the parser would drop the first value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  the context of typer's own click
        _, _, parsed = self.make_parser(ctx).parse_args(list(args))
        for option in parsed:
            if parsed.count(option) > 1 and not option.multiple:
                name = "/".join([*option.opts, *option.secondary_opts])
                raise UsageError(f"{name} is given {parsed.count(option)} times and takes one value; give it once")
        return super().parse_args(ctx, args)
