"""What commands share on their way to a terminal: JSON, tables, sizes, and text from archives made harmless."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import typer
from redistill_cache.wording import harmless
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = [
    "PLACE",
    "TerminalProgress",
    "archive_at",
    "console",
    "human_seconds",
    "key_values",
    "print_json",
    "progress_line",
]

console = Console()


def print_json(value: Any) -> None:  # noqa: ANN401  anything JSON holds
    typer.echo(json.dumps(value, indent=1))


def human_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def key_values(rows: list[tuple[str, object]]) -> None:
    """Two columns: a name and what it is."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(harmless(value), overflow="fold"))
    console.print(table)


@contextmanager
def progress_line(what: str, unit: str = "file") -> Iterator[Any]:
    """A tqdm bar as a callback (done, total); silent when stderr is not a terminal."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=unit, unit_scale=unit == "B", disable=None, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


class Ticker:
    """Progress on stderr: a bar with rate and time left on a terminal, one line now and then elsewhere."""

    SECONDS = 30.0

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._bar: Any = None
        self._said = time.monotonic()
        self._began: tuple[float, int] | None = None

    def update(self, done: int, total: int, **extra: object) -> None:
        if not sys.stderr.isatty():
            self._line(done, total, extra)
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(desc=self._what, unit=self._unit, leave=False, dynamic_ncols=True, smoothing=0.1)
        self._bar.total = total
        self._bar.set_postfix(extra, refresh=False)
        self._bar.update(done - self._bar.n)

    def _line(self, done: int, total: int, extra: dict[str, object]) -> None:
        now = time.monotonic()
        began, before = self._began = self._began or (now, done)  # pace counts from here: what came before took its own
        if now - self._said < self.SECONDS or now == began:
            return
        self._said = now
        pace = (done - before) / (now - began)
        left = human_seconds((total - done) / pace) if pace else "unknown"
        more = "".join(f", {name} {value}" for name, value in extra.items())
        self.write(f"{self._what}: {done:,} of {total:,}, {pace:.1f} {self._unit}s/s, {left} left{more}")

    @property
    def is_open(self) -> bool:
        return self._bar is not None

    def write(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar is not None:
            self._bar.clear()
        typer.echo(text, err=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class TerminalProgress:
    """Progress of a run on a terminal: messages as they come, one bar for each task, a line for every epoch."""

    TASKS = ("index", "teacher", "train")

    def __init__(self, *, last_member_only: bool = False) -> None:
        self._last_member_only = last_member_only
        self._tickers = {task: Ticker(task, "image") for task in self.TASKS}

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(self, *_: object) -> None:
        for ticker in self._tickers.values():
            ticker.close()

    def stage(self, title: str) -> None:
        self.__exit__()
        typer.echo(f"\n* {title}", err=True)

    def info(self, text: str) -> None:
        self._write(harmless(text))

    def warning(self, text: str) -> None:
        self._write(f"warning: {harmless(text)}")

    def advance(self, task: str, done: int, total: int, **figures: object) -> None:
        for name, ticker in self._tickers.items():
            if name != task:
                ticker.close()
        self._tickers[task].update(done, total, **figures)

    def epoch(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows[-1:] if self._last_member_only else rows:
            name = f"{row['name']}  " if len(rows) > 1 else ""
            top1 = f"  top-1 {row['val_top1']:.2%}" if row["val_top1"] != "" else ""
            speed = f"{row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting"
            self._write(f"epoch {row['epoch']:>3}  {name}loss {row['train_loss']:.4f}{top1}  ({speed})")

    def _write(self, text: str) -> None:
        """Above the bar that is open, if one is."""
        open_ticker = next((t for t in self._tickers.values() if t.is_open), self._tickers["train"])
        open_ticker.write(text)


# -- archives ---------------------------------------------------------------------------------------------------------
#
# Archives on the command line: a path, or a URL whose archive is fetched once and is a path from then on.

PLACE = "PATH|URL"


@overload
def archive_at(text: str) -> Path: ...
@overload
def archive_at(text: None) -> None: ...
def archive_at(text: str | None) -> Path | None:
    """Where the archive lies on this machine."""
    from redistill_cache.fetching import fetch_archive, is_url

    if text is None or not is_url(text):
        return None if text is None else Path(text)
    with progress_line(f"fetch {text}", unit="B") as progress:
        return fetch_archive(text, progress=progress)
