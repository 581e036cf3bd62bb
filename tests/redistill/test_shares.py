"""The shares of stage 1: where they are read from, the order of blocks, and one preparation a machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redistill_cache.errors import UsageError

from redistill.shares import Share, prepared_once

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
SRUN = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}
ONE_TASK = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Share()),
        (TORCHRUN, Share(2, 4, 0, 2)),
        (ARRAY, Share(2, 4)),
        (ARRAY | ONE_TASK, Share(2, 4)),
        (SRUN, Share(2, 4, 1, 2)),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "1"} | SRUN, Share(2, 4, 0, 1)),
        (TORCHRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Share(2, 4, 0, 2)),  # one torchrun on each node
        (TORCHRUN | ONE_TASK, Share(2, 4, 0, 2)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3",
          "SLURM_ARRAY_TASK_MAX": "9", "SLURM_ARRAY_TASK_STEP": "2"}, Share(2, 4)),  # --array=3-9:2
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "3",
          "SLURM_ARRAY_TASK_MAX": "7"}, Share(4, 5)),  # --array=3,7
    ],
)  # fmt: skip
def test_the_environment_states_the_share(environment: dict[str, str], expected: Share):
    assert Share.of(None, environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (ARRAY | {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "1/4 from srun, 2/4 from the SLURM array"),
        (TORCHRUN | ARRAY | {"SLURM_ARRAY_TASK_ID": "3"}, "2/4 from torchrun, 3/4 from the SLURM array"),
        (TORCHRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "8"}, "2/4 from torchrun, 1/8 from srun"),  # --standalone
        ({"RANK": "one", "WORLD_SIZE": "2"}, "expected a number in RANK, found 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2; start with torchrun"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "expected a number in RANK"),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "4"}, "SLURM_ARRAY_TASK_ID=4 and SLURM_ARRAY_TASK_COUNT=4"),
    ],
)
def test_shares_that_contradict_each_other_or_cannot_be(environment: dict[str, str], message: str):
    with pytest.raises(UsageError, match=message):
        Share.of(None, environment)
    if "number" not in message and "=" not in message:
        assert Share.of("0/3", environment).count == 3, "the option decides"


@pytest.mark.parametrize("text", ["", "3", "3/3", "-1/3", "1/0", "a/b", "0/3/4", "0 / 3"])
def test_an_option_that_is_no_share(text: str):
    with pytest.raises(UsageError, match="--share must be I/N"):
        Share.of(text, {})


def test_every_share_comes_to_every_block_and_begins_with_its_own():
    orders = [Share(index, 3).work_order(range(11)) for index in range(3)]
    assert [sorted(order) for order in orders] == [list(range(11))] * 3
    assert [order[:3] for order in orders] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert len({order[-1] for order in orders}) == 3, "processes that finish early help with different blocks"
    assert Share(1, 3).work_order(range(11), helps=False) == [1, 4, 7, 10]
    assert orders == [Share(index, 3).work_order(range(11)) for index in range(3)]


# -- one preparation a machine ----------------------------------------------------------------------------------------


SECONDS = 240


def _wait_for(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def _prepare(folder: str, ends_with: str) -> None:
    """Prepare until there is a file of this name. A process that waits for another one writes `told`."""
    path, told = Path(folder), []

    def tell(text: str) -> None:
        told.append(text)
        (path / "told").touch()

    with prepared_once(path / "a.zarr", (path / "ready").exists, tell, lambda: None):
        if (path / "ready").exists():
            (path / f"joined-{os.getpid()}").write_text(" ".join(told))
            return
        (path / f"preparing-{os.getpid()}").touch()
        _wait_for((path / ends_with).exists, f"no file {ends_with}")
        (path / "ready").touch()


@contextmanager
def preparing(folder: Path, ends_with: str) -> Iterator[multiprocessing.Process]:
    """A process that prepares, once it has begun."""
    before = set(folder.glob("preparing-*"))
    process = multiprocessing.get_context("spawn").Process(target=_prepare, args=(str(folder), ends_with))
    process.start()
    try:
        _wait_for(
            lambda: set(folder.glob("preparing-*")) != before or list(folder.glob("joined-*")),
            "the process does not begin",
        )
        yield process
    finally:
        process.kill()
        process.join(SECONDS)


@pytest.mark.timeout(900)
def test_one_process_prepares_and_the_others_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with preparing(tmp_path, ends_with="told") as first:
        _prepare(str(tmp_path), ends_with="told")
        first.join(SECONDS)
    assert [path.name for path in tmp_path.glob("preparing-*")] == [f"preparing-{first.pid}"]
    [joined] = tmp_path.glob("joined-*")
    assert f"waiting for process {first.pid} on " in joined.read_text()


@pytest.mark.timeout(900)
def test_a_process_that_dies_while_it_prepares_is_followed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with preparing(tmp_path, ends_with="never") as first:
        os.kill(first.pid, signal.SIGKILL)
        with preparing(tmp_path, ends_with="cache") as second:
            second.join(SECONDS)
    assert (tmp_path / "ready").exists()
    assert len(list(tmp_path.glob("preparing-*"))) == 2


def test_a_machine_without_a_cache_folder_prepares_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with prepared_once(tmp_path / "a", lambda: False, print, lambda: None):
        pass
