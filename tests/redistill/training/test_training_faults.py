"""A run that is killed, starved of disk or damaged comes out as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from redistill_cache.errors import Damaged

from redistill.interrupts import Interrupted
from redistill.progress import NoProgress
from redistill.training import train
from redistill.training.checkpoint import LAST, PREVIOUS, has_checkpoint, read_state
from tests.redistill.training.test_training_runs import StopAt, history, weights
from tests.redistill.training.train_process import start
from tests.small_archive import DATA, VAL

SECONDS = 120


def arguments(archive: Path, out: Path) -> list[object]:
    """A checkpoint after every batch, so that a kill often meets one half written."""
    plain = "--student demo:tiny --epochs 3 --lr 0.05 --workers 0 --batch-size 32 --ema 0.9 --checkpoint-minutes 0"
    return ["train", DATA, "--archive", archive, "--out", out, "--val", VAL, "--log", "csv", *plain.split()]


def run_to_the_end(archive: Path, out: Path) -> float:
    begun = time.monotonic()
    process = start(*arguments(archive, out), said=out.with_suffix(".txt"))
    process.join(SECONDS)
    assert process.exitcode == 0, out.with_suffix(".txt").read_text()
    return time.monotonic() - begun


def wait_for_a_save(process: ForkServerProcess, path: Path) -> None:
    def saved() -> int:
        try:
            return path.stat().st_ino
        except FileNotFoundError:  # not yet, or between two renames
            return 0

    before = saved()
    while process.is_alive() and saved() in (before, 0):
        time.sleep(0.005)


def kill_often(folder: Path, archive: Path, times: int) -> None:
    """Runs that are killed and taken up until they are through, until there were so many kills."""
    seed = int(os.environ.get("REDISTILL_SEED", "20261121"))
    print(f"replay with REDISTILL_SEED={seed}")
    rng = random.Random(seed)
    run_to_the_end(archive, folder / "straight")
    whole = run_to_the_end(archive, folder / "again")  # the first one waits for the server to import torch
    killed = inside = runs = 0
    while killed < times:
        runs += 1
        assert runs < 20 + 4 * times, f"runs end before they are killed: {killed} kills in {runs} runs"
        out = folder / f"run{runs}"
        done = False
        while not done:
            process = start(*arguments(archive, out), said=folder / "said.txt")
            if killed % 2 == 0:  # every other one while it trains, the rest from its start on
                wait_for_a_save(process, out / LAST)
            else:
                process.join(rng.uniform(0, whole / 2))
            process.join(rng.uniform(0, whole / 4) if killed < times else SECONDS)
            process.kill()
            process.join(SECONDS)
            assert process.exitcode in (0, -signal.SIGKILL), (folder / "said.txt").read_text()
            done = process.exitcode == 0
            killed += not done
            inside += not done and has_checkpoint(out)
        assert weights(out) == weights(folder / "straight")
        assert history(out) == history(folder / "straight")
        assert not list(out.glob("*.partial"))
    print(f"{killed} kills, {inside} of them after the first checkpoint, {runs} runs")
    assert inside >= times // 2, "most kills came before there was anything to lose"


def test_killed_runs_are_taken_up(tmp_path: Path, archive: Path):
    kill_often(tmp_path, archive, 2)


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path, archive: Path):
    kill_often(tmp_path, archive, 50)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, archive: Path):
    """The system refuses files above a size that configuration and figures fit into, and a checkpoint does not."""
    out = tmp_path / "run"
    run_to_the_end(archive, tmp_path / "straight")
    process = start(*arguments(archive, out), said=tmp_path / "first.txt")
    while process.is_alive() and not (out / PREVIOUS).exists():
        time.sleep(0.01)
    process.terminate()
    process.join(SECONDS)
    assert process.exitcode == 128 + signal.SIGTERM, (tmp_path / "first.txt").read_text()
    kept = (out / LAST).read_bytes()
    process = start(*arguments(archive, out), said=tmp_path / "full.txt", largest_file=len(kept) // 2)
    process.join(SECONDS)
    said = [line for line in (tmp_path / "full.txt").read_text().splitlines() if line.startswith("redistill:")]
    assert process.exitcode == 3, said
    assert len(said) == 1
    assert "cannot write" in said[0]
    assert "the checkpoint before it is untouched" in said[0]
    assert (out / LAST).read_bytes() == kept
    run_to_the_end(archive, out)
    assert weights(out) == weights(tmp_path / "straight")


class Warned(NoProgress):
    def __init__(self) -> None:
        self.words: list[str] = []

    def warning(self, text: str) -> None:
        self.words.append(text)


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 16
    path.write_bytes(data)


def test_a_flipped_bit_is_noticed(options, tmp_path: Path):
    straight, broken = options(out=tmp_path / "straight"), options(out=tmp_path / "broken")
    train(straight)
    with pytest.raises(Interrupted):
        train(broken, StopAt(12))
    for at in (0.0, 0.001, 0.3, 0.7, 0.9999):
        flip(broken.out / LAST, at)
        with pytest.raises(Damaged):
            read_state(broken.out / LAST)
        flip(broken.out / LAST, at)
    assert read_state(broken.out / LAST), "flipped back"
    flip(broken.out / LAST, 0.3)
    progress = Warned()
    train(broken, progress)
    assert len(progress.words) == 1
    assert "last.ckpt is damaged" in progress.words[0]
    assert "goes on from last.previous.ckpt" in progress.words[0]
    assert weights(broken.out) == weights(straight.out)
    for path in (broken.out / LAST, broken.out / PREVIOUS):
        flip(path, 0.3)
    with pytest.raises(Damaged, match=r"last\.previous\.ckpt is damaged"):
        train(broken)


def descendants(pid: int) -> set[int]:
    try:
        children = {int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except FileNotFoundError:
        return set()
    return children.union(*map(descendants, children))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux which processes there are")
def test_nobody_is_left_when_the_main_process_is_killed(tmp_path: Path, archive: Path):
    """Rendering processes hold memory; those of a run that was killed must not stay beside those that take it up."""
    out = tmp_path / "run"
    process = start(*arguments(archive, out), "--epochs", 500, "--workers", 2, said=tmp_path / "said.txt")
    while process.is_alive() and not (out / LAST).exists():
        time.sleep(0.01)
    assert process.pid is not None
    others = descendants(process.pid)
    process.kill()
    process.join(SECONDS)
    assert len(others) >= 3, "a server and the two that render"
    until = time.monotonic() + 20
    while (left := [pid for pid in others if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
