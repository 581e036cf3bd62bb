"""Ranks from torchrun's variables, the order in which they share blocks, and what they do when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from redistill_cache.errors import RedistillError, UsageError

from redistill.ranks import SILENT, Rank, joined_world


def test_every_rank_visits_every_block_starting_with_its_own_share():
    ranks = [Rank(rank, 3, rank, 3).work_order(range(11)) for rank in range(3)]
    assert [sorted(order) for order in ranks] == [list(range(11))] * 3
    assert [order[:3] for order in ranks] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert len({order[-1] for order in ranks}) == 3, "ranks that finish early help with different blocks"


@pytest.mark.parametrize("rank", ["one", "2", "-1"])
def test_invalid_rank_variables(monkeypatch: pytest.MonkeyPatch, rank: str):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK"):
        Rank.from_environment()


# -- a rank that dies -------------------------------------------------------------------------------------------------

LIMIT = 60


def wait_for_gpu(rank: int, size: int, port: int, note: Path, victim: int, how: str) -> None:
    """A rank that waits for something that only the heartbeat ends, as for NCCL; the victim dies meanwhile."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ended = "finished"
    try:
        with joined_world("cpu") as world:
            world.barrier()
            if rank == victim and how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == victim and how == "fails":
                raise ValueError("an error of this rank")
            if rank != victim:
                deadline = time.monotonic() + LIMIT
                while how != "ends" and not world.heartbeat.lost.is_set() and time.monotonic() < deadline:
                    time.sleep(0.1)
                if how != "ends":
                    raise RuntimeError("NCCL communicator was aborted on rank 0")
    except (RedistillError, RuntimeError, ValueError) as error:
        ended = f"{type(error).__name__}: {error}"
    note.write_text(ended)


@pytest.mark.parametrize(
    ("victim", "how"), [pytest.param(2, "dies", marks=pytest.mark.slow), (0, "dies"), (1, "fails"), (0, "ends")]
)
def test_all_ranks_end_when_one_does(tmp_path: Path, victim: int, how: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["redistill.ranks"])
    notes = [tmp_path / str(rank) for rank in range(3)]
    ranks = [context.Process(target=wait_for_gpu, args=(rank, 3, port, notes[rank], victim, how)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT + 60)
        alive = process.is_alive()
        process.kill()
        assert not alive
    if how == "dies":
        assert ranks[victim].exitcode == -signal.SIGKILL
    for rank in {0, 1, 2} - {victim}:
        text = notes[rank].read_text()
        assert text == "finished" if how == "ends" else text.startswith("Refused: another rank exited"), text
    if how == "fails":
        assert notes[victim].read_text() == "ValueError: an error of this rank"
    assert SILENT < LIMIT
