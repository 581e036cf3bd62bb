"""Several processes: the same images step by step, one copy of the teacher's rows, and no end without a word."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from redistill.training import TrainOptions
from redistill.training.checkpoint import LAST
from tests.redistill.training.test_training_runs import history, weights
from tests.redistill.training.train_process import start, start_ranks
from tests.small_archive import DATA

SECONDS = 120


def steps(records: Iterable[Path]) -> list[list[str]]:
    """The images of each step, whichever process saw them."""
    ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in records]
    return [sorted(image for share in shares for image in share) for shares in zip(*ranks, strict=True)]


def record(tmp_path: Path, options: TrainOptions, name: str, world: int, stop_at: int = 0) -> list[list[str]]:
    plain = f"--epochs 2 --lr 0.05 --workers 0 --batch-size {options.batch_size} --loss kl --log csv"
    student = "python:tests.recording_student:build?norm=half"
    asked = ("train", DATA, "--archive", options.archive, "--out", options.out, "--student", student, *plain.split())
    to = {"RECORD_TO": str(tmp_path / name), "STOP_AT": str(stop_at)}
    said = tmp_path / f"{name}.txt"
    processes = (
        [start(*asked, said=said, environment=to)]
        if world == 1
        else start_ranks(world, *asked, said=said, environment=to)
    )
    for process in processes:
        process.join(SECONDS)
    codes = {process.exitcode for process in processes}
    assert codes == {128 + signal.SIGTERM if stop_at else 0}, [p.read_text() for p in tmp_path.glob(f"{name}.txt*")]
    return steps(sorted(tmp_path.glob(f"{name}-*.jsonl")))


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_the_same_batches_for_any_number_of_processes(options, tmp_path: Path, before: int, after: int):
    """Stopped in the middle of an epoch, gone on by another number of processes: image by image, step by step."""
    alone = record(tmp_path, options(batch_size=8, out=tmp_path / "alone"), "alone", 1)
    assert [len(step) for step in alone[:19]].count(8) == 17, "150 images in 19 batches, no smaller than 7"
    assert len({image for step in alone[:19] for image in step}) == 150
    run = options(batch_size=8, out=tmp_path / "run")
    first = record(tmp_path, run, "first", before, stop_at=5)
    assert 5 <= len(first) < 19
    assert first + record(tmp_path, run, "second", after) == alone
    for one, other in zip(history(tmp_path / "alone"), history(run.out), strict=True):
        assert float(one["train_kl"]) == pytest.approx(float(other["train_kl"]), rel=1e-5), "of all processes"


# -- one copy, one word -----------------------------------------------------------------------------------------------


def two(archive: Path, out: Path, *extra: object) -> list[ForkServerProcess]:
    plain = "--student demo:tiny --lr 0.05 --workers 0 --batch-size 16 --log csv"
    asked = ("train", DATA, "--archive", archive, "--out", out, *plain.split(), *extra)
    return start_ranks(2, *asked, said=out.with_suffix(".txt"), environment={})


def last_words(out: Path, processes: list[ForkServerProcess]) -> list[tuple[int | None, list[str]]]:
    """The exit code of every process, and the lines it said that are not figures."""
    for process in processes:
        process.join(SECONDS)
        process.kill()
    said = [out.with_name(f"{out.stem}.txt-{rank}").read_text().splitlines() for rank in range(2)]
    figures = ("epoch", "views are exact", "run", "power-0")
    words = [[line for line in lines if line.strip() and not line.startswith(figures)] for lines in said]
    return [(process.exitcode, lines) for process, lines in zip(processes, words, strict=True)]


@pytest.mark.slow
def test_rows_shared_through_memory_or_a_file(tmp_path: Path, archive: Path):
    for name, memory in (("memory", 1), ("file", 0)):
        out = tmp_path / name
        found = last_words(out, two(archive, out, "--epochs", 4, "--cache-memory", memory))
        spilled = ["the teacher's rows of two views exceed --cache-memory; they lie in a temporary file"]
        assert found == [(0, spilled if memory == 0 else []), (0, [])]
    assert weights(tmp_path / "memory") == weights(tmp_path / "file")


@pytest.mark.slow
def test_damage_that_one_process_meets_is_told_to_all(tmp_path: Path, archive: Path):
    shutil.copytree(archive, tmp_path / "archive")
    shard = tmp_path / "archive/teachers/small/logits/q/c.1.0.0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    for code, words in last_words(tmp_path / "run", two(tmp_path / "archive", tmp_path / "run", "--epochs", 3)):
        assert code == 4
        assert len(words) == 1
        assert "logits/q/c.1.0.0" in words[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_whoever_is_left_alone_says_so(tmp_path: Path, archive: Path, victim: int):
    out = tmp_path / "run"
    processes = two(archive, out, "--epochs", 400)
    while all(process.is_alive() for process in processes) and not (out / LAST).exists():
        time.sleep(0.01)
    processes[victim].kill()
    found = last_words(out, processes)
    assert found[victim] == (-signal.SIGKILL, [])
    code, words = found[1 - victim]
    assert code == 3, words
    assert len(words) == 1
    assert "another process of this run has ended" in words[0]
