"""Stage 1 in small: a run of a second, as a call and as processes that can be killed."""

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

__all__ = ["DATA", "OTHER_TEACHER", "TEACHER", "asked", "command", "files_of", "note_of", "started"]

CLASSES = 10
# 61 rows are neither whole blocks nor whole batches. The teacher has learned something, so its answers differ by row.
DATA = f"synthetic?{DIFFICULTY}&n=61"
TEACHER = f"{TEACHER_NETWORK}&weights={TEACHER_WEIGHTS}"
OTHER_TEACHER = f"demo:tiny?num_classes={CLASSES}&weights=random"
SMALL = {"views": 2, "batch_size": 7, "workers": 0, "block_rows": 32, "codec": "compander"}


def asked(out: Path, **changed: Any) -> CacheOptions:
    """Options of a small run, some of them changed."""
    plain = {"data": DATA, "teacher": TEACHER, "out": out, **SMALL}
    return CacheOptions(**(plain | changed))


def command(out: Path, **changed: Any) -> list[str]:
    """The same as words of a command line."""
    changed = SMALL | changed
    words = ["cache-teacher", changed.pop("data", DATA), "--teacher", changed.pop("teacher", TEACHER)]
    for name, value in changed.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return [*words, "--out", str(out)]


def files_of(path: Path) -> dict[str, str]:
    """Every file but the notes, by its hash."""
    files = (file for file in path.rglob("*") if file.is_file() and "notes" not in file.parts)
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def note_of(path: Path) -> dict[str, Any]:
    """What the only run that committed something said of itself."""
    [note] = (path / "_redistill" / "notes").iterdir()
    return json.loads(note.read_text())


# Processes are forked from a server that has imported everything: the real command, without its start-up time.


def run_command(words: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
    from redistill_cli.__main__ import main

    os.setsid()  # to be killed as a group, as by a scheduler
    os.environ.update(environment)
    sys.argv = ["redistill", *words]
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        main()


def started(words: Sequence[str], output: Path, **environment: str) -> ForkServerProcess:
    """`redistill WORDS` as a process and a group of its own, which writes all it says to `output`."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["pytest", "redistill_cli.cache_teacher", "redistill.caching", "redistill.loading"])
    process = server.Process(target=run_command, args=(words, environment, output), daemon=False)
    process.start()
    return process
