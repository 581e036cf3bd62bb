"""Pieces of HTML: text made harmless, tables, figures, sections, and numbers with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from redistill_cache.wording import harmless

from redistill.report.runs import Group, spread

__all__ = [
    "DOT",
    "LINE",
    "NOTHING",
    "definition_list",
    "figure",
    "missing",
    "name_list",
    "named",
    "section",
    "share",
    "table",
    "text",
    "value",
]

# What stands beside the name of a group.
LINE = '<path class="curve {}" d="M1 4H21"/>'
DOT = '<circle class="dot {}" cx="17" cy="4" r="3.2"/>'

NOTHING = '<span class="soft">–</span>'


def text(found: object) -> str:
    """Text from anywhere as HTML: no markup, and nothing invisible that turns the direction of what follows."""
    return escape(harmless(found))


def section(title: str, body: str, lead: str = "") -> str:
    """A part of the page under its heading; `lead` is a sentence that says how to read it."""
    says = f'<p class="lead">{text(lead)}</p>' if lead else ""
    return f"<section><h2>{text(title)}</h2>{says}{body}</section>"


def missing(what: str) -> str:
    """In place of something that is not there."""
    return f'<p class="missing">{text(what)}</p>'


def figure(title: str, drawing: str, caption: str = "", kind: str = "") -> str:
    """A drawing under its title; nothing where there is no drawing."""
    if not drawing:
        return ""
    head = f"<h3>{text(title)}</h3>" if title else ""
    note = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{head}{drawing}{note}</figure>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already. The first of a row is its heading; on a phone each row stands by itself."""
    top = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    body = "".join(f"<tr>{table_row(columns, row)}</tr>" for row in rows)
    head = f"<thead><tr>{top}</tr></thead>"
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def table_row(columns: Sequence[str], row: Sequence[str]) -> str:
    head, *cells = row
    names = columns[1:]
    said = "".join(f'<td data-name="{text(name)}">{cell}</td>' for name, cell in zip(names, cells, strict=True))
    return f'<th scope="row">{head}</th>{said}'


def definition_list(items: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, which is HTML already."""
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{found}</dd>' for name, found in items)}</dl>"


def named(group: Group, mark: str) -> str:
    """The name of a group in its colour, beside what it looks like in a drawing."""
    key = f'<svg class="key" viewBox="0 0 22 8" aria-hidden="true">{mark.format(group.look)}</svg>'
    return f'{key}<span class="ink c{group.look.colour % 8}">{text(group.name)}</span>'


def name_list(groups: Sequence[Group], mark: str) -> str:
    """All names, for drawings that have no room for them."""
    return f'<ul class="keys">{"".join(f"<li>{named(group, mark)}</li>" for group in groups)}</ul>'


def value(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds."""
    found = spread(values)
    if found is None:
        return NOTHING
    mean, deviation = found
    shown = "" if deviation is None else f"± {deviation:.{digits}f}"
    return f'{mean:,.{digits}f}<span class="sd">{shown}</span>'


def share(values: Sequence[float]) -> str:
    """The same in percent."""
    return value([100 * item for item in values], 1)
