"""`redistill` in processes of its own, which tests kill, deprive of disk space, or start as several ranks.

They are forked from a server that has imported torch, so that fifty of them cost no start-up time.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import resource
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from redistill_cli.__main__ import main

__all__ = ["SECONDS", "rank_environments", "start", "start_ranks"]

SECONDS = 240
"""After which a process that still runs is a failure."""

held_ports = ExitStack()
atexit.register(held_ports.close)


def run_command(arguments: list[str], output: Path, environment: Mapping[str, str], largest_file: int | None) -> None:
    os.environ.update(environment)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["redistill", *arguments]
    main()


def start(
    *arguments: object, output: Path, environment: Mapping[str, str] | None = None, largest_file: int | None = None
) -> ForkServerProcess:
    """A running `redistill ...`; stdout and stderr go to the file `output`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["redistill.training", "redistill_cli.app"])
    process = context.Process(
        target=run_command, args=([str(part) for part in arguments], output, environment or {}, largest_file)
    )
    process.start()
    return process


def start_ranks(
    world_size: int, *arguments: object, output: Path, environment: Mapping[str, str]
) -> list[ForkServerProcess]:
    """The processes that torchrun would start on one machine, in the same environment. Rank r writes `output`-r."""
    return [
        start(*arguments, output=output.with_name(f"{output.name}-{rank}"), environment={**environment, **of_rank})
        for rank, of_rank in enumerate(rank_environments(world_size))
    ]


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes on one machine.

    Until the tests end, no other process is given the port: a socket that allows another one, and never listens, has
    it. Rank 0 takes seconds to start, while the servers and clients of other tests get the ports that are free.
    """
    held = held_ports.enter_context(socket.socket())
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(held.getsockname()[1]),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
