"""Small runs of stage 1 that take about a second: called directly, or started as processes that can be killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from redistill.caching import CacheOptions
from redistill.demo.run import DIFFICULTY, TEACHER_NETWORK, TEACHER_WEIGHTS
from redistill.progress import NoProgress
from tests import odd_teachers

__all__ = [
    "DATA",
    "FIVE_CLASSES",
    "OTHER_TEACHER",
    "TEACHER",
    "SignalAtBatch",
    "cache_options",
    "command_line",
    "file_hashes",
    "five_class_options",
    "odd_teacher",
    "read_note",
    "start_command",
]

CLASSES = 10
# 61 rows are not a multiple of the block or batch size. The teacher is trained, so its logits differ between rows.
DATA = f"synthetic?{DIFFICULTY}&n=61"
TEACHER = f"{TEACHER_NETWORK}&weights={TEACHER_WEIGHTS}"
OTHER_TEACHER = f"demo:tiny?num_classes={CLASSES}&weights=random"
SMALL = {"views": 2, "batch_size": 7, "workers": 0, "block_rows": 32, "codec": "compander"}
# Five classes and an untrained teacher; 90 rows make three blocks, the last one smaller.
FIVE_CLASSES = {
    "data": "synthetic?n=90&classes=5",
    "teacher": "demo:small?num_classes=5&weights=random",
    "batch_size": 16,
    "codec": "auto",
}


def cache_options(out: Path, **changes: Any) -> CacheOptions:
    """Options of a small run, with `changes`."""
    defaults = {"data": DATA, "teacher": TEACHER, "out": out, **SMALL}
    return CacheOptions(**(defaults | changes))


def five_class_options(out: Path, **changes: Any) -> CacheOptions:
    return cache_options(out, **(FIVE_CLASSES | changes))


def command_line(out: Path, **changes: Any) -> list[str]:
    """The same options as arguments of `redistill`."""
    options = SMALL | changes
    arguments = ["cache-teacher", options.pop("data", DATA), "--teacher", options.pop("teacher", TEACHER)]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        arguments += [flag] if value is True else [flag, str(value)]
    return [*arguments, "--out", str(out)]


def odd_teacher(name: str) -> str:
    """The spec string of a teacher of five classes in tests/odd_teachers.py."""
    return f"python:{odd_teachers.__name__}:{name}?num_classes=5&norm=half&size=32"


def file_hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file except the notes, by path."""
    files = (file for file in path.rglob("*") if file.is_file() and "notes" not in file.parts)
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def read_note(path: Path) -> dict[str, Any]:
    """The note of the only run that committed a block."""
    [note] = (path / "_redistill" / "notes").iterdir()
    return json.loads(note.read_text())


class SignalAtBatch(NoProgress):
    """Sends a signal to its own process after a number of teacher batches."""

    def __init__(self, number: int, batches: int = 1) -> None:
        self.number, self.batches_left = number, batches

    def advance(self, task: str, *_: object, **__: object) -> None:
        self.batches_left -= task == "teacher"
        if self.batches_left == 0:
            os.kill(os.getpid(), self.number)


# Processes are forked from a server that has imported everything: the real command without its start-up time.


def run_command(arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
    from redistill_cli.__main__ import main

    os.setsid()  # its own process group, so that it can be killed as a scheduler does
    os.environ.update(environment)
    sys.argv = ["redistill", *arguments]
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        main()


def start_command(arguments: Sequence[str], output: Path, **environment: str) -> ForkServerProcess:
    """Start `redistill ARGUMENTS` in its own process group, with all output in the file `output`."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["pytest", "redistill_cli.cache_teacher", "redistill.caching", "redistill.loading"])
    process = server.Process(target=run_command, args=(arguments, environment, output), daemon=False)
    process.start()
    return process
