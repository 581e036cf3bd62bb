"""What commands share on their way to a terminal: JSON, tables, sizes, and text from archives made harmless."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["console", "human_bytes", "key_values", "print_json", "progress_line", "safe"]

console = Console()


def safe(text: object) -> str:
    """Text from an archive or a file name without control characters: it must not drive the reader's terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text))


def print_json(value: Any) -> None:  # noqa: ANN401  anything JSON holds
    typer.echo(json.dumps(value, indent=1))


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def key_values(rows: list[tuple[str, object]]) -> None:
    """Two columns: a name and what it is."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(safe(value)))
    console.print(table)


@contextmanager
def progress_line(what: str) -> Iterator[Any]:
    """A tqdm bar as a callback (done, total); silent when stderr is not a terminal."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="file", disable=None, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
