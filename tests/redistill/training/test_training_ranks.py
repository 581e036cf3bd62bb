"""Several ranks: the same images step by step, one copy of the teacher rows, and an error message from every rank."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from redistill_cache.errors import Refused

from redistill.training import TrainOptions
from redistill.training.checkpoint import LAST
from redistill.training.targets import FileArray
from tests.redistill.training.runs import history, weights
from tests.redistill.training.train_process import SECONDS, start, start_ranks
from tests.small_archive import DATA


def images_of_steps(records: Iterable[Path]) -> list[list[str]]:
    """The images of each global batch, over all ranks."""
    ranks = [[json.loads(line) for line in path.read_text().splitlines()] for path in records]
    return [sorted(image for images in of_ranks for image in images) for of_ranks in zip(*ranks, strict=True)]


def record(
    tmp_path: Path,
    options: TrainOptions,
    name: str,
    world_size: int,
    stop_at: int = 0,
    data: str = DATA,
    extra: tuple[object, ...] = (),
) -> list[list[str]]:
    """Train on `world_size` ranks, until SIGTERM at step `stop_at` or to the end; the images of each step."""
    plain = f"--epochs 2 --lr 0.05 --workers 0 --batch-size {options.batch_size} --loss kl --log csv"
    student = "python:tests.recording_student:build?norm=half"
    arguments = ("train", data, "--archive", options.archive, "--out", options.out, "--student", student)
    arguments += (*plain.split(), *extra)
    environment = {"RECORD_TO": str(tmp_path / name), "STOP_AT": str(stop_at)}
    output = tmp_path / f"{name}.txt"
    processes = (
        [start(*arguments, output=output, environment=environment)]
        if world_size == 1
        else start_ranks(world_size, *arguments, output=output, environment=environment)
    )
    for process in processes:
        process.join(SECONDS)
    codes = {process.exitcode for process in processes}
    assert codes == {128 + signal.SIGTERM if stop_at else 0}, [p.read_text() for p in tmp_path.glob(f"{name}.txt*")]
    return images_of_steps(sorted(tmp_path.glob(f"{name}-*.jsonl")))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_batches_are_the_same_for_any_number_of_ranks(options, tmp_path: Path, before: int, after: int):
    """Interrupted in the middle of an epoch and resumed on another number of ranks: the same images in every step."""
    alone = record(tmp_path, options(batch_size=8, out=tmp_path / "alone"), "alone", 1)
    assert [len(step) for step in alone[:19]].count(8) == 17, "150 images in 19 batches, no smaller than 7"
    assert len({image for step in alone[:19] for image in step}) == 150
    run = options(batch_size=8, out=tmp_path / "run")
    first = record(tmp_path, run, "first", before, stop_at=5)
    assert 5 <= len(first) < 19
    assert first + record(tmp_path, run, "second", after) == alone
    for row, expected in zip(history(run.out), history(tmp_path / "alone"), strict=True):
        assert float(row["train_kl"]) == pytest.approx(float(expected["train_kl"]), rel=1e-5), "of all ranks"


# -- one copy of the rows, one error message --------------------------------------------------------------------------


def start_two(archive: Path, out: Path, *extra: object) -> list[ForkServerProcess]:
    plain = "--student demo:tiny --lr 0.05 --workers 0 --batch-size 16 --log csv"
    arguments = ("train", DATA, "--archive", archive, "--out", out, *plain.split(), *extra)
    return start_ranks(2, *arguments, output=out.with_suffix(".txt"), environment={})


def exits(out: Path, processes: list[ForkServerProcess]) -> list[tuple[int | None, list[str]]]:
    """The exit code of every rank, and the lines it printed that are not metrics."""
    for process in processes:
        process.join(SECONDS)
        process.kill()
    outputs = [out.with_name(f"{out.stem}.txt-{rank}").read_text().splitlines() for rank in range(2)]
    settings = [
        "archive",
        "teacher",
        "recipe",
        "validation",
        "student",
        "loss",
        "seed",
        "optimizer",
        "schedule",
        "batch",
        "device",
    ]
    untrained = "warning: teacher small predicts"  # the teacher of these tests is not trained
    metrics = ("epoch", "views are exact", "run", "power-0", "report:", untrained, *settings)
    texts = [[line for line in lines if line.strip() and not line.startswith(metrics)] for lines in outputs]
    return [(process.exitcode, lines) for process, lines in zip(processes, texts, strict=True)]


@pytest.mark.slow
def test_rows_are_shared_in_memory_or_in_a_file(tmp_path: Path, archive: Path):
    for name, memory in (("memory", 1), ("file", 0)):
        out = tmp_path / name
        spilled = ["the teacher rows of two views exceed --cache-memory; they are in a temporary file"]
        expected = [(0, spilled if memory == 0 else []), (0, [])]
        assert exits(out, start_two(archive, out, "--epochs", 4, "--cache-memory", memory)) == expected
    assert weights(tmp_path / "memory") == weights(tmp_path / "file")


@pytest.mark.slow
def test_every_rank_reports_damage_that_one_of_them_reads(tmp_path: Path, archive: Path):
    shutil.copytree(archive, tmp_path / "archive")
    shard = tmp_path / "archive/teachers/small/logits/q/c.1.0.0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    for code, lines in exits(tmp_path / "run", start_two(tmp_path / "archive", tmp_path / "run", "--epochs", 3)):
        assert code == 4
        assert len(lines) == 1
        assert "logits/q/c.1.0.0" in lines[0]


def test_an_array_of_a_dead_process_is_reported_as_an_exited_rank():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(Refused, match="another rank exited"):
        FileArray(f"/proc/{process.pid}/fd/3", "|u1", (1,)).open()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_rank_reports_a_killed_rank(tmp_path: Path, archive: Path, victim: int):
    out = tmp_path / "run"
    processes = start_two(archive, out, "--epochs", 400)
    while all(process.is_alive() for process in processes) and not (out / LAST).exists():
        time.sleep(0.01)
    processes[victim].kill()
    results = exits(out, processes)
    assert results[victim] == (-signal.SIGKILL, [])
    code, lines = results[1 - victim]
    assert code == 3, lines
    assert len(lines) == 1
    assert "another rank exited" in lines[0]
