"""Batches from workers: with a small /dev/shm, few open files, and workers that die."""

from __future__ import annotations

import os
import pickle
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from redistill_cache.errors import Refused

from redistill.loading import FILES_OF_WORKER, FILES_OF_WORKERS, BatchLoader, _InMemoryFile, default_workers
from redistill.training.feed import ViewBatch, collate_views
from redistill.views.dataset import RenderedView

ChildProcesses = Callable[[], set[BaseProcess]]

SECONDS = 240
BATCHES = [(i, [i, i + 1]) for i in range(20)]


class Items(torch.utils.data.Dataset):
    """Item i is a view of 224 px filled with i."""

    def __getitems__(self, indices: list[int]) -> list[RenderedView]:
        return [RenderedView(torch.full((3, 224, 224), i, dtype=torch.uint8), i, i, 0) for i in indices]


def loader(workers: int) -> BatchLoader:
    return BatchLoader(Items(), workers=workers, collate=collate_views)


def check(batches: Iterator[tuple[int, ViewBatch]]) -> None:
    loaded = dict(batches)
    assert list(loaded) == [i for i, _ in BATCHES]
    for i, batch in loaded.items():
        assert batch.labels.tolist() == [i, i + 1]
        assert batch.pixels.shape == (2, 3, 224, 224)
        assert (batch.pixels == batch.labels.view(2, 1, 1, 1)).all()
        assert batch.partner_labels is None
        batch.pixels.add_(1)  # the receiver owns the memory


def test_workers_serve_one_pass_after_the_other_and_end_with_the_context(child_processes: ChildProcesses):
    with loader(2) as loading:
        check(loading.load(BATCHES))
        first = child_processes()
        check(loading.load(BATCHES))
        assert child_processes() == first
        assert len(first) == 2
    assert not child_processes()


def test_a_batch_is_one_write_to_the_pipe():
    """A worker that is killed in the middle of a longer message leaves the main process waiting for its end."""
    batch = collate_views(Items().__getitems__(list(range(200))))
    message = ForkingPickler.dumps((0, _InMemoryFile(batch)))
    assert len(message) + 4 < select.PIPE_BUF
    received = pickle.loads(message)[1]
    assert type(received) is ViewBatch
    assert torch.equal(received.pixels, batch.pixels)
    assert torch.equal(received.labels, batch.labels)


def test_a_worker_that_is_killed_while_it_waits_is_refused_in_the_next_pass(child_processes: ChildProcesses):
    with loader(2) as loading:
        check(loading.load(BATCHES))
        victim = child_processes().pop()
        os.kill(victim.pid, signal.SIGKILL)
        victim.join(SECONDS)
        with pytest.raises(Refused, match="a rendering worker died"):
            check(loading.load(BATCHES))
    assert not child_processes()


def test_a_worker_that_died_after_it_sent_a_batch_is_refused_however_late_its_death_is_known(
    child_processes: ChildProcesses,
):
    """The batch is fetched from the worker, which is gone; the server, which knows that, is stopped for seconds."""
    with loader(1) as loading:
        batches = loading.load(BATCHES)
        next(batches)
        (worker,) = child_processes()
        assert loading._iterator._worker_result_queue._reader.poll(SECONDS)
        server = forkserver._forkserver._forkserver_pid
        os.kill(server, signal.SIGSTOP)
        late = threading.Timer(3, os.kill, (server, signal.SIGCONT))
        late.start()
        try:
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(Refused, match="a rendering worker died"):
                list(batches)
        finally:
            late.join()
    assert not child_processes()


def test_workers_that_are_slow_to_end_are_gone_as_well(
    child_processes: ChildProcesses, monkeypatch: pytest.MonkeyPatch
):
    """torch waits some seconds for each, terminates those that are left, and does not wait for them."""
    with loader(2) as loading:
        check(loading.load(BATCHES))
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.0)
    assert not child_processes()


def test_too_few_open_files_are_refused_before_the_workers_start():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 14, hard))
    try:
        with loader(2) as loading, pytest.raises(Refused, match=r"too few for 2 workers; raise ulimit -n or"):
            check(loading.load(BATCHES))
        check(loader(0).load(BATCHES))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("cores", "processes", "workers"), [(1, 2, 1), (40, 1, 40), (128, 8, 16), (192, 1, 48)])
def test_a_worker_for_every_core(monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, workers: int):
    monkeypatch.setattr("redistill.loading.usable_cores", lambda: cores)
    assert default_workers(processes) == workers
    assert 2 * (FILES_OF_WORKERS + FILES_OF_WORKER * workers) < 1024 - 100, "of training and of validation"


# -- whole commands ---------------------------------------------------------------------------------------------------

DATA, MODEL = "synthetic?classes=4&n=512&size=64", "demo:tiny?num_classes=4&weights=random"


def small_shm(*command: object, size: str = "2m") -> subprocess.CompletedProcess[str]:
    """`redistill ...` with a /dev/shm of this size; the default holds two batches of the test."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    arguments = [sys.executable, "-m", "redistill_cli", *map(str, command)]
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    return subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="may not mount a small /dev/shm")
def test_both_stages_run_with_a_small_shm(tmp_path: Path):
    archive, run = tmp_path / "a.zarr", tmp_path / "run"
    common = ("--batch-size", 128, "--workers", 2)
    recipe = ("--recipe", "rrc?size=64", "--views", 1)
    cached = small_shm("cache-teacher", DATA, "--teacher", MODEL, *recipe, *common, "--out", archive)
    assert (cached.returncode, "Traceback" in cached.stderr) == (0, False), cached.stderr
    plain = ("--student", "demo:tiny", "--epochs", 1, "--log", "csv")
    trained = small_shm("train", DATA, "--archive", archive, *plain, *common, "--out", run)
    assert (trained.returncode, "Traceback" in trained.stderr) == (0, False), trained.stderr
    assert np.isfinite(float((run / "metrics.csv").read_text().splitlines()[1].split(",")[2]) or 0)


@pytest.mark.skipif(not can_mount(), reason="may not mount a small /dev/shm")
def test_a_full_shm_is_refused_in_one_line(tmp_path: Path):
    """The semaphores of the workers do not fit."""
    common = ("--teacher", MODEL, "--recipe", "rrc?size=64", "--views", 1, "--workers", 8, "--out", tmp_path / "a.zarr")
    found = small_shm("cache-teacher", DATA, *common, size="64k")
    assert found.returncode == 3
    (line,) = [line for line in found.stderr.splitlines() if "shm" in line or "rror" in line]
    assert line.startswith("redistill: /dev/shm has ")
    assert "too little for the locks of 8 workers (128.0 KiB); free or enlarge it" in line
    assert "Traceback" not in found.stderr


def has_child(pid: int, mark: str) -> bool:
    """Whether a process has a child with this text in its command line."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return any(mark in Path(f"/proc/{child}/cmdline").read_text() for child in children)
    except FileNotFoundError:  # ended meanwhile
        return False


CACHE = ["cache-teacher", "synthetic?classes=4&n=20000&size=32", "--teacher", MODEL, "--views", "2"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists processes as Linux does")
@pytest.mark.parametrize("mark", ["spawn_main", "forkserver"])
def test_one_ctrl_c_ends_every_process_while_they_start(mark: str, tmp_path: Path):
    """Those that index images (spawned), or the server of the workers: all receive the signal, as in a terminal."""
    command = [*CACHE, "--workers", "2"] if mark == "spawn_main" else [*CACHE[:1], DATA, *CACHE[2:], "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "redistill_cli", *command, "--out", tmp_path / "a.zarr"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while process.poll() is None and not has_child(process.pid, mark):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=SECONDS)[0]  # until all processes have closed it
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert "redistill: interrupted by SIGINT; run the same command again" in output
    assert "Traceback" not in output
    assert process.returncode == 130
