"""Output shared by the commands: JSON, tables and progress; and archives given as a path or a URL."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, overload

import typer
from redistill_cache.addresses import redact
from redistill_cache.wording import harmless
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from redistill_cache.reader import Archive

__all__ = [
    "ARCHIVE_HELP",
    "PATH_OR_URL",
    "Offline",
    "ProgressBar",
    "TerminalProgress",
    "console",
    "held_part",
    "human_seconds",
    "key_values",
    "local_archive",
    "note",
    "print_json",
    "set_offline",
    "streamed_archive",
]

WIDE = 1_000_000


class Output(Console):
    """Standard output: as wide as the terminal; elsewhere every row is one line, without padding at its end."""

    def print(self, *objects: Any, **options: Any) -> None:  # noqa: ANN401  what rich can print
        if self.file.isatty():
            super().print(*objects, **options)
            return
        self.width = WIDE
        with self.capture() as captured:
            super().print(*objects, **options)
        typer.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


console = Output()


def print_json(value: Any) -> None:  # noqa: ANN401  anything JSON holds
    typer.echo(json.dumps(value, indent=1))


def human_seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def key_values(rows: list[tuple[str, object]]) -> None:
    """Two columns: names and values."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(harmless(value), overflow="fold"))
    console.print(table)


# -- progress ---------------------------------------------------------------------------------------------------------


class ProgressBar:
    """Progress of one task on stderr: a bar on a terminal, a line every 30 seconds elsewhere."""

    SECONDS = 30.0
    LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining} left{postfix}"

    def __init__(self, task: str, unit: str) -> None:
        from tqdm import tqdm

        self.task, self._unit = task, unit
        self._bar = tqdm(
            desc=task,
            unit=unit,
            unit_scale=unit == "B",
            leave=False,
            dynamic_ncols=True,
            smoothing=0.1,
            disable=not sys.stderr.isatty(),
        )
        self._last_line = time.monotonic()
        self._start: tuple[float, int] | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()

    def update(self, done: int, total: int, **figures: object) -> None:
        if self._bar.disable:
            self._line(done, total, figures)
            return
        if self._start is None:  # what was done before does not count for the rate
            self._start = time.monotonic(), done
            self._bar.initial = self._bar.n = self._bar.last_print_n = done
        self._bar.total = total
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(done - self._bar.n)

    def write(self, text: str) -> None:
        """A line above the bar."""
        self._bar.clear()
        typer.echo(harmless(text), err=True)
        self._bar.refresh()

    def _line(self, done: int, total: int, figures: Mapping[str, object]) -> None:
        now = time.monotonic()
        if (
            self._start is None
        ):  # the rate is that of this process: a resumed task starts with the images of an earlier run
            self._start = now, done
        start, before = self._start
        if now - self._last_line < self.SECONDS or now == start:
            return
        self._last_line = now
        postfix = ", ".join(f"{name} {value}" for name, value in figures.items())
        text = self._bar.format_meter(
            n=done,
            total=total,
            initial=before,
            elapsed=now - start,
            prefix=self.task,
            postfix=postfix,
            bar_format=self.LINE,
            unit=self._unit if self._unit == "B" else f" {self._unit}s",
            unit_scale=self._unit == "B",
        )
        typer.echo(text, err=True)


class TerminalProgress:
    """Progress of a run on stderr: messages, a bar for the current task, a line per epoch.

    `brief`: of the epochs of a cohort only the last member's, and no settings.
    """

    def __init__(self, *, brief: bool = False) -> None:
        self._brief = brief
        self._bar: ProgressBar | None = None

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def stage(self, title: str) -> None:
        self._close()
        typer.echo(f"\n* {title}", err=True)

    def settings(self, settings: Mapping[str, str]) -> None:
        width = max(map(len, settings), default=0)
        for name, text in settings.items() if not self._brief else ():
            self.info(f"{name:<{width}}  {text}")

    def info(self, text: str) -> None:
        self._write(harmless(redact(text)))

    def warning(self, text: str) -> None:
        self._write(f"warning: {harmless(redact(text))}")

    def advance(self, task: str, done: int, total: int, **figures: object) -> None:
        if self._bar is None or self._bar.task != task:
            self._close()
            self._bar = ProgressBar(task, "B" if task.startswith("fetch") else "image")
        self._bar.update(done, total, **figures)

    def epoch(self, rows: Sequence[Mapping[str, Any]]) -> None:
        width = max(len(row["name"]) for row in rows)
        for row in rows[-1:] if self._brief else rows:
            name = f"{row['name']:<{width}}  " if len(rows) > 1 else ""
            top1 = f"  top-1 {row['val_top1']:.2%}" if row["val_top1"] != "" else ""
            speed = f"{row['images_per_second']:.0f} images/s, {row['data_wait']:.0%} waiting for data"
            self._write(f"epoch {row['epoch']:>3}  {name}loss {row['train_loss']:.4f}{top1}  ({speed})")

    def _write(self, text: str) -> None:
        if self._bar is None:
            typer.echo(text, err=True)
        else:
            self._bar.write(text)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


# -- archives ---------------------------------------------------------------------------------------------------------

PATH_OR_URL = "PATH|URL"
ARCHIVE_HELP = "Path such as name.redistill.zarr, or URL; with #sha256=ID after it, only the archive with this id."

Offline = Annotated[
    bool, typer.Option("--offline", help="Contact no server; use the copies of what was fetched before.")
]


def set_offline(offline: bool) -> None:
    """For this command and the processes it starts."""
    from redistill_cache.download import OFFLINE

    if offline:
        os.environ[OFFLINE] = "1"


def held_part(here: int, sealed: int, lacking: Mapping[str, int]) -> str:
    """What a copy holds of its archive, `lacking` being the teachers with fewer views than others."""
    fewer = (f", of teacher {name} {first_views(count)}" for name, count in lacking.items())
    return harmless(f"holds {first_views(here)} of {sealed}{''.join(fewer)}")


def first_views(count: int) -> str:
    return "none" if count == 0 else "view 0" if count == 1 else f"views 0-{count - 1}"


def note(text: str) -> None:
    """A message of a download."""
    typer.echo(f"redistill: {harmless(text)}", err=True)


def streamed_archive(location: str) -> Archive | None:
    """The archive at a URL, or in packed form, as soon as everything that is not of a view is here; None for a path."""
    from redistill_cache.addresses import is_address
    from redistill_cache.fetching import locate
    from redistill_cache.packed import is_packed
    from redistill_cache.reader import stream_archive

    if not (is_address(location) or is_packed(location)):
        return None
    with ProgressBar(f"fetch {locate(location)}", "B") as bar:
        return stream_archive(location, progress=bar.update, notify=bar.write)


@overload
def local_archive(location: str) -> Path: ...
@overload
def local_archive(location: None) -> None: ...
def local_archive(location: str | None) -> Path | None:
    """The path of an archive, which is fetched once from a URL or from its packed form, and must have a pinned id."""
    from redistill_cache.addresses import is_address, split_pin
    from redistill_cache.fetching import check_id, fetch_archive, locate
    from redistill_cache.packed import is_packed

    if location is None:
        return None
    if is_address(location) or is_packed(location):
        with ProgressBar(f"fetch {locate(location)}", "B") as bar:
            return fetch_archive(location, progress=bar.update, notify=bar.write)
    path, identity = split_pin(location)
    if identity is not None:
        check_id(Path(path), identity)
    return Path(path)
