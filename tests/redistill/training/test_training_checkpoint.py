"""A run that is killed, has no disk space or has a damaged checkpoint gives the same weights as an undisturbed one."""

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
from tests.redistill.training.runs import InterruptAt, history, weights
from tests.redistill.training.train_process import SECONDS, start
from tests.small_archive import DATA, VAL


def arguments(archive: Path, out: Path) -> list[object]:
    """A checkpoint after every batch, so that many kills happen while one is written."""
    plain = "--student demo:tiny --epochs 3 --lr 0.05 --workers 0 --batch-size 32 --ema 0.9 --checkpoint-minutes 0"
    return ["train", DATA, "--archive", archive, "--out", out, "--val", VAL, "--log", "csv", *plain.split()]


def run_to_end(archive: Path, out: Path) -> float:
    """Seconds of an undisturbed run."""
    started = time.monotonic()
    process = start(*arguments(archive, out), output=out.with_suffix(".txt"))
    process.join(SECONDS)
    assert process.exitcode == 0, out.with_suffix(".txt").read_text()
    return time.monotonic() - started


def wait_for_a_save(process: ForkServerProcess, path: Path) -> None:
    def inode() -> int:
        try:
            return path.stat().st_ino
        except FileNotFoundError:  # not yet, or between two renames
            return 0

    before = inode()
    while process.is_alive() and inode() in (before, 0):
        time.sleep(0.005)


def kill_and_resume(folder: Path, archive: Path, kills: int) -> None:
    """Kill runs at random times and resume them, until `kills` were made; compare every finished run."""
    seed = int(os.environ.get("REDISTILL_SEED", "20261121"))
    print(f"repeat with REDISTILL_SEED={seed}")
    rng = random.Random(seed)
    run_to_end(archive, folder / "straight")
    whole = run_to_end(archive, folder / "again")  # the first run includes the start of the server
    killed = with_checkpoint = runs = 0
    while killed < kills:
        runs += 1
        assert runs < 20 + 4 * kills, f"runs end before they are killed: {killed} kills in {runs} runs"
        out = folder / f"run{runs}"
        done = False
        while not done:
            process = start(*arguments(archive, out), output=folder / "output.txt")
            if killed % 2 == 0:  # every other one while it trains, the rest at any time
                wait_for_a_save(process, out / LAST)
            else:
                process.join(rng.uniform(0, whole / 2))
            process.join(rng.uniform(0, whole / 4) if killed < kills else SECONDS)
            process.kill()
            process.join(SECONDS)
            assert process.exitcode in (0, -signal.SIGKILL), (folder / "output.txt").read_text()
            done = process.exitcode == 0
            killed += not done
            with_checkpoint += not done and has_checkpoint(out)
        assert weights(out) == weights(folder / "straight")
        assert history(out) == history(folder / "straight")
        assert not list(out.glob("*.partial"))
    print(f"{killed} kills, {with_checkpoint} of them after the first checkpoint, {runs} runs")
    assert with_checkpoint >= kills // 2, "most kills were too early to lose anything"


@pytest.mark.timeout(900)
def test_a_killed_run_is_resumed(tmp_path: Path, archive: Path):
    kill_and_resume(tmp_path, archive, 1)


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path, archive: Path):
    kill_and_resume(tmp_path, archive, 50)


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path: Path, archive: Path):
    """The system refuses files above a size that is enough for configuration and metrics, but not for a checkpoint."""
    out = tmp_path / "run"
    run_to_end(archive, tmp_path / "straight")
    process = start(*arguments(archive, out), output=tmp_path / "first.txt")
    while process.is_alive() and not (out / PREVIOUS).exists():
        time.sleep(0.01)
    process.terminate()
    process.join(SECONDS)
    assert process.exitcode == 128 + signal.SIGTERM, (tmp_path / "first.txt").read_text()
    checkpoint = (out / LAST).read_bytes()
    process = start(*arguments(archive, out), output=tmp_path / "full.txt", largest_file=len(checkpoint) // 2)
    process.join(SECONDS)
    errors = [line for line in (tmp_path / "full.txt").read_text().splitlines() if line.startswith("redistill:")]
    assert process.exitcode == 3, errors
    assert len(errors) == 1
    assert "cannot write" in errors[0]
    assert "the previous checkpoint is intact" in errors[0]
    assert (out / LAST).read_bytes() == checkpoint
    run_to_end(archive, out)
    assert weights(out) == weights(tmp_path / "straight")


class RecordWarnings(NoProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str) -> None:
        self.texts.append(text)


def flip_bit(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 16
    path.write_bytes(data)


def test_a_flipped_bit_is_detected_and_the_previous_checkpoint_used(options, tmp_path: Path):
    straight, broken = options(out=tmp_path / "straight"), options(out=tmp_path / "broken")
    train(straight)
    with pytest.raises(Interrupted):
        train(broken, InterruptAt(12))
    for at in (0.0, 0.001, 0.3, 0.7, 0.9999):
        flip_bit(broken.out / LAST, at)
        with pytest.raises(Damaged):
            read_state(broken.out / LAST)
        flip_bit(broken.out / LAST, at)
    assert read_state(broken.out / LAST), "flipped back"
    flip_bit(broken.out / LAST, 0.3)
    progress = RecordWarnings()
    train(broken, progress)
    (told,) = [text for text in progress.texts if "damaged" in text]
    assert "last.ckpt is damaged" in told
    assert "resuming from last.previous.ckpt" in told
    assert weights(broken.out) == weights(straight.out)
    for path in (broken.out / LAST, broken.out / PREVIOUS):
        flip_bit(path, 0.3)
    with pytest.raises(Damaged, match=r"last\.previous\.ckpt is damaged"):
        train(broken)


def descendants(pid: int) -> set[int]:
    try:
        children = {int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except FileNotFoundError:
        return set()
    return children.union(*map(descendants, children))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists processes as Linux does")
def test_workers_exit_when_the_main_process_is_killed(tmp_path: Path, archive: Path):
    """Workers hold memory; those of a killed run must not stay beside those of the resumed one."""
    out = tmp_path / "run"
    changed = {"--epochs": 500, "--workers": 2}
    plain = arguments(archive, out)
    for name, value in changed.items():
        plain[plain.index(name) + 1] = value
    process = start(*plain, output=tmp_path / "output.txt")
    while process.is_alive() and not (out / LAST).exists():
        time.sleep(0.01)
    assert process.pid is not None
    others = descendants(process.pid)
    process.kill()
    process.join(SECONDS)
    assert len(others) >= 3, "a server and two workers"
    deadline = time.monotonic() + SECONDS
    while (alive := [pid for pid in others if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive
