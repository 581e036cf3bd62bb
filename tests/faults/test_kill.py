"""kill -9 of real writers, and real writers racing for one block."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import redistill_cache
from redistill_cache.layout import Block
from redistill_cache.writer import ArchiveWriter

from tests.faults.scenario import DIGESTS, KEYS, LABELS, SIZES, SPEC, believed_rows, hashes, leftovers, write_archive

ROOT = Path(__file__).resolve().parents[2]


def start(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.writer_process", str(path)]
    search = os.pathsep.join([str(ROOT), str(ROOT / "cache")])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": search}
    )


def kill_after(process: subprocess.Popen[str], lines: int, delay: float) -> list[str]:
    """Wait for some lines, then a little more, then kill -9; everything the process had said by then."""
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(lines)]
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read()
    process.wait()
    process.stdout.close()
    return [line for line in "".join([*said, rest]).split("\n") if line]


def survive(path: Path, rng: random.Random, reference: tuple[str, dict[str, str]]) -> bool:
    """Kill a writer at a random moment, look at what is left, finish it. Whether the kill came before the end."""
    said = kill_after(start(path), rng.randint(1, 10), rng.random() * 0.05)
    for line in said:
        word, _, what = line.partition(" ")
        if word == "committed":
            assert (path / what).exists(), f"{what} was committed and is gone"
    if path.exists() and any(line.startswith("committed") for line in said):
        believed_rows(path, partial=True)
    assert write_archive(path) == reference[0]
    assert hashes(path) == reference[1]
    assert not leftovers(path)
    return not said[-1].startswith("sealed")


def kill_often(tmp_path: Path, times: int, reference: tuple[str, dict[str, str]]) -> None:
    seed = int(os.environ.get("REDISTILL_SEED", "20261121"))
    print(f"REDISTILL_SEED={seed}")
    rng = random.Random(seed)
    early = [survive(tmp_path / f"{i}.redistill.zarr", rng, reference) for i in range(times)]
    assert sum(early) > times / 2, "most kills must come while the archive is written"


def test_killed_writers(tmp_path: Path, reference: tuple[str, dict[str, str]]):
    kill_often(tmp_path, 20, reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_killed_writers(tmp_path: Path, reference: tuple[str, dict[str, str]]):
    kill_often(tmp_path, 200, reference)


# -- races ------------------------------------------------------------------------------------------------------------


def contend(folder: str, rounds: int, me: int, barrier: Barrier, results: Queue[Any]) -> None:
    """Write one block of every archive with my own rows, at the same moment as the other."""
    for number in range(rounds):
        writer = ArchiveWriter.resume(Path(folder) / f"{number}.redistill.zarr", SPEC)
        block = writer.missing("views")[0]
        rows = len(block.rows)
        arrays = {"crop": np.full((rows, 4), me, np.int32), "flip": np.full(rows, me, np.uint8)}
        barrier.wait(60)
        results.put((number, me, writer.write(block, arrays)))
        barrier.wait(60)


def race(tmp_path: Path, rounds: int) -> None:
    for number in range(rounds):
        writer = ArchiveWriter.create(tmp_path / f"{number}.redistill.zarr", SPEC)
        writer.write_samples(KEYS, LABELS, DIGESTS, SIZES)
    context = multiprocessing.get_context("spawn")
    results, barrier = context.Queue(), context.Barrier(2)
    processes = [context.Process(target=contend, args=(tmp_path, rounds, me, barrier, results)) for me in (1, 2)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=120) for _ in range(2 * rounds)]
    for process in processes:
        process.join()
    winners = {number: me for number, me, won in outcomes if won}
    assert len(winners) == sum(won for *_, won in outcomes) == rounds, "exactly one writer wins each block"
    for number, me in winners.items():
        path = tmp_path / f"{number}.redistill.zarr"
        archive = redistill_cache.open_archive(path, allow_partial=True)
        assert archive.contents.holds(Block("views", 0, 0, 0, 16))
        found = archive.view_params(0, np.arange(16))
        assert set(np.unique(found["crop"])) == set(np.unique(found["flip"])) == {me}, "rows of two writers are mixed"
        assert not leftovers(path), "the loser left something behind"


def test_two_writers_race_for_one_block(tmp_path: Path):
    race(tmp_path, 25)


@pytest.mark.slow
def test_two_writers_race_a_hundred_times(tmp_path: Path):
    race(tmp_path, 100)
