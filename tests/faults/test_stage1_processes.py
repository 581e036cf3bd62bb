"""`redistill cache-teacher` when one of its processes is killed, or all receive a signal, as from a scheduler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from redistill.caching import cache_teacher
from tests.stage1 import OTHER_TEACHER, cache_options, command_line, file_hashes

# Real commands with real workers: each takes seconds to start.
pytestmark = pytest.mark.slow
SECONDS = 200
# Many small blocks, so that most of the work remains when the first of them is committed.
MANY = {"data": "synthetic?classes=10&n=400", "teacher": OTHER_TEACHER, "batch_size": 8, "block_rows": 8}
TORCHRUN = ("torch.distributed.run", "--master-port=0", "--nproc-per-node={}", "-m", "redistill_cli")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted") / "a.zarr"
    cache_teacher(cache_options(path, **MANY))
    return path


@contextmanager
def running(path: Path, module: tuple[str, ...] = ("redistill_cli",), **changed: object) -> Iterator[subprocess.Popen]:
    """The full command in its own process group, once it has committed a block of the teacher."""
    command = [sys.executable, "-m", *module, *command_line(path, **MANY | changed)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_for(lambda: process.poll() is not None or any(path.glob("_redistill/blocks/teachers.tiny.0.*")))
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(done: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, f"still waiting after {SECONDS} s"
        time.sleep(0.002)


def error_line(process: subprocess.Popen) -> str:
    """The one line of stderr that begins with the program's name, once the process has ended."""
    stderr = process.communicate(timeout=SECONDS)[1]
    lines = [line for line in stderr.splitlines() if line.startswith("redistill: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


def children(pid: int) -> dict[int, str]:
    """The child processes of a process, and their command lines."""
    commands = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                commands[int(folder.name)] = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
    return commands


def workers(pid: int) -> list[int]:
    """The processes that render: children of the server they are forked from."""
    servers = [child for child, command_line in children(pid).items() if "forkserver" in command_line]
    return [worker for server in servers for worker in children(server)]


def assert_continues(path: Path, uninterrupted: Path) -> None:
    assert not (path / "_redistill/manifest.json").exists(), "the run finished before it was stopped"
    cache_teacher(cache_options(path, **MANY))
    assert file_hashes(path) == file_hashes(uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_ends_the_run_in_one_line(
    ram: Path, uninterrupted: Path, number: signal.Signals, code: int
):
    with running(ram / "a.zarr", workers=2) as process:
        rendering = workers(process.pid)
        assert len(rendering) == 2
        os.killpg(process.pid, number)
        assert f"interrupted by {number.name}; run the same command again to continue" in error_line(process)
        assert process.returncode == code
        wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in rendering))
    assert_continues(ram / "a.zarr", uninterrupted)


def test_a_killed_worker_ends_the_run_in_one_line(ram: Path, uninterrupted: Path):
    with running(ram / "a.zarr", workers=2) as process:
        os.kill(workers(process.pid)[0], signal.SIGKILL)
        assert "a rendering worker died" in error_line(process)
        assert process.returncode == 3
    assert_continues(ram / "a.zarr", uninterrupted)


def test_workers_do_not_outlive_a_killed_run(ram: Path, uninterrupted: Path):
    with running(ram / "a.zarr", workers=2) as process:
        rendering = workers(process.pid)
        process.kill()
        process.wait(SECONDS)
        wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in rendering))
    assert_continues(ram / "a.zarr", uninterrupted)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("killed", "ranks"), [(0, 1), (1, 1), (1, 3)])
def test_any_number_of_ranks_continues_after_a_killed_rank(ram: Path, uninterrupted: Path, killed: int, ranks: int):
    path, torchrun = ram / "a.zarr", [word.format(2) for word in TORCHRUN]
    with running(path, module=tuple(torchrun)) as process:
        [rank] = [pid for pid in children(process.pid) if rank_of(pid) == str(killed)]
        os.kill(rank, signal.SIGKILL)
        process.communicate(timeout=SECONDS)
        assert process.returncode == 1, "torchrun ends the other ranks"
    if ranks == 1:
        assert_continues(path, uninterrupted)
        return
    command = [sys.executable, "-m", *(word.format(ranks) for word in TORCHRUN), *command_line(path, **MANY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert file_hashes(path) == file_hashes(uninterrupted)


def rank_of(pid: int) -> str | None:
    environment = (Path("/proc") / str(pid) / "environ").read_text().split("\0")
    return next((word.removeprefix("RANK=") for word in environment if word.startswith("RANK=")), None)


def array_task(path: Path, task: int, tasks: int) -> subprocess.Popen:
    """One task of a SLURM array."""
    variables = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(tasks)}
    return subprocess.Popen(
        [sys.executable, "-m", "redistill_cli", *command_line(path, **MANY)],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
def test_an_array_of_tasks_that_are_killed_at_random(ram: Path, uninterrupted: Path, seed: int):
    """Any tasks may start first, die at any moment, and be run again as an array of another size."""
    random, path = Random(seed), ram / "a.zarr"
    for tasks in (6, 4):
        started = [array_task(path, task, tasks) for task in random.sample(range(tasks), tasks)]
        deadline = time.monotonic() + random.uniform(6, 25)  # the import of torch takes the first seconds
        for process in started[: tasks // 2 + (tasks == 6) * 3]:  # all of the first array, half of the second
            time.sleep(max(0.0, deadline - time.monotonic()) * random.random())
            os.killpg(process.pid, signal.SIGKILL)
        for process in started:
            _, stderr = process.communicate(timeout=SECONDS * 4)
            assert process.returncode in (0, -signal.SIGKILL), stderr
    if not (path / "_redistill/manifest.json").exists():
        cache_teacher(cache_options(path, **MANY))
    assert file_hashes(path) == file_hashes(uninterrupted)
