"""Concurrent writers: competing for one block, and writing one archive together."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError

import numpy as np
import pytest
import redistill_cache
from redistill_cache.errors import RedistillError
from redistill_cache.layout import Block
from redistill_cache.writer import ArchiveWriter

from tests.faults.scenario import (
    DIGESTS,
    KEYS,
    LABELS,
    SIZES,
    SPEC,
    all_missing,
    block_arrays,
    block_stats,
    hashes,
    leftovers,
    open_writer,
    prepare,
    write_archive,
)
from tests.faults.writer_process import SelfKillingFiles, context

Reference = tuple[str, dict[str, str]]
# Longer than any load of the machine delays a process: what is stuck is stuck for good.
SECONDS = 240


def write_one_block(folder: Path, rounds: int, writer_id: int, barrier: Barrier, parent: Connection) -> None:
    """Write one block of every archive at the same time as another process, which writes other rows."""
    for number in range(rounds):
        writer = ArchiveWriter.resume(folder / f"{number}.redistill.zarr", SPEC)
        block = writer.missing("views")[0]
        rows = len(block.rows)
        arrays = {"crop": np.full((rows, 4), writer_id, np.int32), "flip": np.full(rows, writer_id, np.uint8)}
        barrier.wait(SECONDS)
        won = writer.write(block, arrays) is not None
        assert writer.read_back().state.holds(block), "a writer must be able to read a block that is committed"
        parent.send((number, writer_id, won))
        barrier.wait(SECONDS)


def race(folder: Path, rounds: int) -> None:
    for number in range(rounds):
        writer = ArchiveWriter.create(folder / f"{number}.redistill.zarr", SPEC)
        writer.write_samples(KEYS, LABELS, DIGESTS, SIZES)
    barrier = context().Barrier(2)
    pipes = [context().Pipe(duplex=False) for _ in range(2)]
    processes = [
        context().Process(target=write_one_block, args=(folder, rounds, writer_id, barrier, pipe[1]))
        for writer_id, pipe in enumerate(pipes, 1)
    ]
    for process in processes:
        process.start()
    outcomes = []
    while len(outcomes) < 2 * rounds:
        ready = wait([ours for ours, _ in pipes], SECONDS)
        assert ready, f"both writers are stuck after {len(outcomes)} results"
        outcomes += [ours.recv() for ours in ready]  # type: ignore[union-attr]
    for process in processes:
        process.join()
    for ours, theirs in pipes:
        ours.close()
        theirs.close()
    winners = {number: writer_id for number, writer_id, won in outcomes if won}
    assert len(winners) == sum(won for *_, won in outcomes) == rounds, "exactly one writer wins each block"
    for number, writer_id in winners.items():
        path = folder / f"{number}.redistill.zarr"
        archive = redistill_cache.open_archive(path, allow_partial=True)
        assert archive.state.holds(Block("views", 0, 0, 0, 16))
        params = archive.view_params(0, np.arange(16))
        assert set(np.unique(params["crop"])) == set(np.unique(params["flip"])) == {writer_id}, (
            "rows of two writers are mixed"
        )
        assert not leftovers(path), "the loser left files behind"


def test_two_writers_race_for_one_block(ram: Path):
    race(ram, 25)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_writers_race_for_a_hundred_blocks(ram: Path):
    race(ram, 100)


# -- the same command, started several times --------------------------------------------------------------------------


# Whether each of the writers can make hard links; the others rename exclusively.
DISKS = {"links": (True, True), "renames": (False, False), "both": (True, False)}


def write_whole(path: Path, barrier: Barrier, fatal: int, links: bool, parent: Connection) -> None:
    barrier.wait(SECONDS)
    try:
        parent.send(write_archive(path, SelfKillingFiles(fatal, links=links)))
    except RedistillError as error:
        parent.send(error)


def run_together(path: Path, fatal: list[int], links: Sequence[bool] = (True,)) -> list[str | Exception]:
    """Start several writers of the same archive at the same time; the results of those that are not killed.

    The writers take turns in what `links` says.
    """
    barrier = context().Barrier(len(fatal))
    pipes = [context().Pipe(duplex=False) for _ in fatal]
    processes = [
        context().Process(target=write_whole, args=(path, barrier, number, links[i % len(links)], pipe[1]))
        for i, (number, pipe) in enumerate(zip(fatal, pipes, strict=True))
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    results: list[str | Exception] = []
    for process, (ours, _) in zip(processes, pipes, strict=True):
        process.join(SECONDS)
        assert process.exitcode is not None, "a writer is stuck"
        if ours.poll() and process.exitcode == 0:
            results.append(ours.recv())
        ours.close()
    return results


def write_together(folder: Path, times: int, reference: Reference) -> None:
    rng = random.Random(times)
    for number in range(times):
        path = folder / f"{number}.redistill.zarr"
        fatal = [0, 0, rng.randint(1, 400)]  # one of three is killed before it finishes
        results = run_together(path, fatal)
        assert results[:2] == [reference[0]] * 2, f"run {number}, kill at operation {fatal[2]}"
        assert write_archive(path) == reference[0]
        assert hashes(path) == reference[1]
        assert not leftovers(path)


def test_three_writers_write_one_archive(ram: Path, reference: Reference):
    write_together(ram, 6, reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_writers_write_one_archive_a_hundred_times(ram: Path, reference: Reference):
    write_together(ram, 100, reference)


def kill_most(folder: Path, times: int, disk: str, reference: Reference) -> None:
    """Six writers, of which four are killed at random operations: the archive is that of one writer without faults."""
    rng = random.Random(disk)
    for number in range(times):
        path = folder / f"{disk}-{number}.redistill.zarr"
        fatal = [0, 0, *(rng.randint(1, 400) for _ in range(4))]
        results = run_together(path, fatal, DISKS[disk])
        assert results[:2] == [reference[0]] * 2, f"{disk}, run {number}, kills at operations {fatal[2:]}"
        assert write_archive(path) == reference[0]
        assert hashes(path) == reference[1]
        assert not leftovers(path)
        shutil.rmtree(path)


@pytest.mark.parametrize("disk", ["renames", "both"])
def test_six_writers_without_hard_links_write_one_archive(ram: Path, disk: str, reference: Reference):
    kill_most(ram, 1, disk, reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("disk", DISKS)
def test_six_writers_write_one_archive_a_hundred_times(ram: Path, disk: str, reference: Reference):
    kill_most(ram, 100, disk, reference)


# -- starting and finishing at the same moment ------------------------------------------------------------------------


def start_and_finish(folder: Path, rounds: int, number: int, barrier: Barrier, parent: Connection) -> None:
    """Start every archive together with other processes, and seal it together; the first process writes its blocks."""
    for index in range(rounds):
        path = folder / f"{index}.redistill.zarr"
        result: object
        barrier.wait(SECONDS)
        try:
            writer = open_writer(path)
            prepare(writer)
            barrier.wait(SECONDS)
            if number == 0:
                for block in list(all_missing(writer)):
                    writer.write(block, block_arrays(block), block_stats(block))
            barrier.wait(SECONDS)
            result = writer.seal()
            assert redistill_cache.open_archive(path).id == result
        except (RedistillError, OSError, BrokenBarrierError) as error:
            result = f"{type(error).__name__}: {error}"
            barrier.abort()
        parent.send(result)
        barrier.wait(SECONDS)
        if number == 0:
            found = leftovers(path)
            shutil.rmtree(path)
            parent.send(found)


def start_and_finish_together(folder: Path, rounds: int, processes: int, identity: str) -> None:
    barrier = context().Barrier(processes)
    pipes = [context().Pipe(duplex=False) for _ in range(processes)]
    started = [
        context().Process(target=start_and_finish, args=(folder, rounds, number, barrier, pipe[1]))
        for number, pipe in enumerate(pipes)
    ]
    for process in started:
        process.start()
    try:
        for index in range(rounds):
            results = []
            for ours, _ in pipes:
                assert ours.poll(SECONDS), f"a process is stuck in round {index}"
                results.append(ours.recv())
            assert results == [identity] * processes, f"round {index}"
            assert pipes[0][0].recv() == [], f"round {index}: leftovers"
    finally:
        for process in started:
            process.kill()
            process.join()
        for pipe in pipes:
            for end in pipe:
                end.close()


def test_processes_that_start_and_finish_together_all_end_well(ram: Path, reference: Reference):
    start_and_finish_together(ram, 10, 4, reference[0])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_pairs_start_and_finish_together(ram: Path, reference: Reference):
    start_and_finish_together(ram, 1000, 2, reference[0])
