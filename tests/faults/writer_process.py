"""Real processes that write the archive of scenario.py, to be killed.

They are forked from a server that has imported everything, so that hundreds of them start quickly; each creates
its event loop and threads after the fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from redistill_cache.storage import Files

from tests.faults.no_links import NoLinks
from tests.faults.scenario import block_arrays, codec, write_archive

__all__ = ["SelfKillingFiles", "context", "start_writer"]


class SelfKillingFiles(Files):
    """The real disk; kills its own process with SIGKILL just before operation `fatal` (from 1)."""

    def __init__(self, fatal: int, *, links: bool = True) -> None:
        self._left, self._links = fatal, links

    def _do(self, operation: Callable[[], None]) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        operation()

    def make_directory(self, path: Path) -> None:
        self._do(lambda: super(SelfKillingFiles, self).make_directory(path))

    def write(self, path: Path, data: bytes | memoryview) -> None:
        self._do(lambda: super(SelfKillingFiles, self).write(path, data))

    def sync_file(self, path: Path) -> None:
        self._do(lambda: super(SelfKillingFiles, self).sync_file(path))

    def sync_directory(self, path: Path) -> None:
        self._do(lambda: super(SelfKillingFiles, self).sync_directory(path))

    def rename(self, old: Path, new: Path) -> None:
        self._do(lambda: super(SelfKillingFiles, self).rename(old, new))

    def link(self, old: Path, new: Path) -> None:
        if not self._links:
            NoLinks().link(old, new)
        self._do(lambda: super(SelfKillingFiles, self).link(old, new))

    def rename_exclusively(self, old: Path, new: Path) -> None:
        self._do(lambda: super(SelfKillingFiles, self).rename_exclusively(old, new))

    def remove(self, path: Path) -> None:
        self._do(lambda: super(SelfKillingFiles, self).remove(path))


def write_and_report(path: Path, fatal: int, parent: Connection) -> None:
    """The body of a writer process: sends "ready", the record path of every committed block, and the id."""
    codec()
    parent.send("ready")
    parent.send(write_archive(path, SelfKillingFiles(fatal), lambda block: parent.send(block.record_path)))


def context() -> ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["pytest", block_arrays.__module__])
    return server


def start_writer(path: Path, fatal: int = 0) -> tuple[ForkServerProcess, Connection]:
    """Start a writer; the process, and the receiving end of its pipe."""
    ours, theirs = context().Pipe(duplex=False)
    process = context().Process(target=write_and_report, args=(path, fatal, theirs))
    process.start()
    theirs.close()
    return process, ours
