"""Ranks from torchrun's variables, and what they do when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from redistill_cache.errors import RedistillError, UsageError

from redistill.ranks import SILENT, Rank, joined_world
from tests.redistill.training.train_process import rank_environments


@pytest.mark.parametrize("rank", ["one", "2", "-1"])
def test_invalid_rank_variables(monkeypatch: pytest.MonkeyPatch, rank: str):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK"):
        Rank.from_environment()


def test_training_under_srun_alone_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Each of the processes would train the same student on all images."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(UsageError, match=r"srun started 8 processes, .* start one torchrun on each node"):
        Rank.from_environment()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert Rank.from_environment() == Rank()


# -- a rank that dies -------------------------------------------------------------------------------------------------

LIMIT = 180


def wait_for_gpu(environment: dict[str, str], note: Path, victim: int, how: str) -> None:
    """A rank that waits for something that only the heartbeat ends, as for NCCL; the victim dies meanwhile."""
    os.environ |= environment
    rank, ended = int(environment["RANK"]), "finished"
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("victim", "how"), [pytest.param(2, "dies", marks=pytest.mark.slow), (0, "dies"), (1, "fails"), (0, "ends")]
)
def test_all_ranks_end_when_one_does(tmp_path: Path, victim: int, how: str):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["redistill.ranks"])
    notes = [tmp_path / str(rank) for rank in range(3)]
    ranks = [
        context.Process(target=wait_for_gpu, args=(environment, notes[rank], victim, how))
        for rank, environment in enumerate(rank_environments(3))
    ]
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
