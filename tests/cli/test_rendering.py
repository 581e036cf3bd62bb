"""Progress where stderr is not a terminal."""

from __future__ import annotations

import io
import itertools
from types import SimpleNamespace

import pytest
from redistill_cli import rendering
from redistill_cli.rendering import ProgressBar, TerminalProgress, console, key_values
from rich.table import Table


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys):
    """lines() -> what was written to stderr; every reading of its clock is 10 seconds later."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(rendering, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    return lambda: capsys.readouterr().err.splitlines()


def test_a_line_every_30_seconds_with_the_rate_of_this_process(lines):
    with TerminalProgress() as progress:
        for done in range(500, 1200, 100):
            progress.advance("train", done, 1200, loss="0.5")
    assert lines() == [
        "train: 700 of 1200, 10.00 images/s, 00:50 left, loss 0.5",
        "train: 1000 of 1200, 10.00 images/s, 00:20 left, loss 0.5",
    ]


def test_another_task_has_its_own_rate(lines):
    with TerminalProgress() as progress:
        for done in range(0, 400, 100):
            progress.advance("index", done, 400)
        progress.stage("next")
        for done in range(0, 40, 10):
            progress.advance("train", done, 40)
    assert lines() == [
        "index: 200 of 400, 10.00 images/s, 00:20 left",
        "",
        "* next",
        "train: 20 of 40,  1.00 images/s, 00:20 left",
    ]


def test_bytes_have_units(lines):
    with ProgressBar("fetch", "B") as bar:
        for done in range(4):
            bar.update(done * 10_000_000, 50_000_000)
    assert lines() == ["fetch: 20.0M of 50.0M, 1.00MB/s, 00:30 left"]


def test_what_was_done_before_does_not_count_for_the_rate_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    with ProgressBar("fetch", "B") as bar:
        bar.update(900_000_000, 1_000_000_000)
        bar.update(901_000_000, 1_000_000_000)
        shown = bar._bar.format_dict
        assert (shown["initial"], shown["n"], shown["total"]) == (900_000_000, 901_000_000, 1_000_000_000)
        assert (shown["rate"] or 0) * (shown["elapsed"] or 1) < 100_000_000


def test_messages_are_harmless(lines):
    TerminalProgress().warning("\x1b[31mred")
    assert lines() == ["warning: \\x1b[31mred"]


def test_settings_are_lines_of_names_and_values(lines):
    TerminalProgress().settings({"loss": "kl", "optimizer": "adam\x07"})
    TerminalProgress(brief=True).settings({"loss": "kl"})
    assert lines() == ["loss       kl", "optimizer  adam\\x07"]


def test_piped_output_has_a_line_for_every_row_however_long(capsys):
    key_values([("citation", "word " * 100 + "end"), ("id", "x" * 300)])
    table = Table(box=None)
    table.add_column("name")
    table.add_row("long " * 60 + "end")
    table.add_row("short")
    console.print(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].endswith("word end")
    assert lines[1].endswith("x" * 300)
    assert lines == [line.rstrip() for line in lines]
