"""Shared by tests of runs: an interruption at a step, and the files of a run."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

from redistill.progress import NoProgress

__all__ = ["InterruptAt", "history", "weights"]


class InterruptAt(NoProgress):
    """Sends SIGINT, as Ctrl-C does, at a training step."""

    def __init__(self, step: int) -> None:
        self.steps_left = step

    def advance(self, task: str, *_: object, **__: object) -> None:
        self.steps_left -= task == "train"
        if self.steps_left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def history(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without timings."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for timing in ("seconds", "images_per_second", "data_wait"):
            del row[timing]
    return rows
