"""Stage 1 as a job array on a shared disk: what share of the tasks' time is lost to coordination?

A simulation with the real writer and real files, but a clock of its own: one task runs at a time, computing a block and
each operation on the disk advance its clock by a stated time, and the task with the earliest clock runs next. So 512
tasks can be measured on two cores, and every run gives the same figures. Tasks differ in speed by some percent, and
writing is not overlapped with computing, as it is in a real run: the figures are upper bounds of the loss.

`ratio` is the time in which the blocks could be computed by all tasks together, if blocks were infinitely small, over
the time until the archive is sealed; `of_ideal` is that of whole blocks, given out by a scheduler that costs nothing.
"""

from __future__ import annotations

import heapq
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from harness import arguments, report
from redistill_cache import ArchiveSpec, ArchiveWriter, TeacherSpec
from redistill_cache.codecs import open_codec
from redistill_cache.layout import Block
from redistill_cache.spec import SignalSpec
from redistill_cache.storage import Files

from redistill.shares import Share

CLASSES, ROWS, VIEWS = 4, 8, 2
# Seconds of one operation: that of a metadata server, or of a synced write to it.
DISKS = {"local": 0.0001, "NFS": 0.005}
# A block of 16,384 views at 2,000 images/s.
BLOCK_SECONDS = 8.0
SPEED_DEVIATION = 0.02
PART = "teachers/t"
CODEC = open_codec("float16", CLASSES, {"metric": "kl", "fidelity": 1e-3, "keep_shift": False}, {})


class Clock:
    """Virtual time of several threads. Exactly one runs, until it waits; then the earliest one does."""

    def __init__(self) -> None:
        self.now = 0.0
        self._waiting: list[tuple[float, int, threading.Event]] = []
        self._arrivals = 0

    def turn(self, seconds: float) -> threading.Event:
        """Set when a thread that waits for this time may run."""
        turn = threading.Event()
        self._arrivals += 1
        heapq.heappush(self._waiting, (self.now + seconds, self._arrivals, turn))
        return turn

    def wait(self, seconds: float) -> None:
        turn = self.turn(seconds)
        self.next()
        turn.wait()

    def next(self) -> None:
        """Let the earliest waiting thread run."""
        if self._waiting:
            self.now, _, turn = heapq.heappop(self._waiting)
            turn.set()


class SlowFiles(Files):
    """Every change takes the time of one operation; so does looking for a file."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def make_directory(self, path: Path) -> None:
        self.clock.wait(self.seconds)
        super().make_directory(path)

    def write(self, path: Path, data: bytes | memoryview) -> None:
        self.clock.wait(self.seconds)
        super().write(path, data)

    def sync_file(self, path: Path) -> None:
        del path
        self.clock.wait(self.seconds)

    def sync_directory(self, path: Path) -> None:
        del path
        self.clock.wait(self.seconds)

    def rename(self, old: Path, new: Path) -> None:
        self.clock.wait(self.seconds)
        super().rename(old, new)

    def link(self, old: Path, new: Path) -> None:
        self.clock.wait(self.seconds)
        super().link(old, new)

    def remove(self, path: Path) -> None:
        self.clock.wait(self.seconds)
        super().remove(path)


def spec(blocks: int) -> ArchiveSpec:
    return ArchiveSpec(
        num_samples=blocks // VIEWS * ROWS,
        num_views=VIEWS,
        num_classes=CLASSES,
        class_names=None,
        block_rows=ROWS,
        recipe={"version": 1, "ops": []},
        seed=0,
        view_arrays=(),
        canaries_per_view=0,
        source={"kind": "simulated"},
        excluded=(),
        licence="",
        citation="",
        environment={},
    )


def create(path: Path, blocks: int) -> None:
    """An archive with a teacher and no blocks."""
    writer = ArchiveWriter.create(path, spec(blocks))
    count = writer.spec.num_samples
    labels, sizes = np.zeros(count, np.int64), np.full((count, 2), 8, np.uint32)
    digests = np.random.default_rng(0).integers(0, 256, (count, 32), np.uint8)
    writer.write_samples([f"{i:08d}" for i in range(count)], labels, digests, sizes)
    writer.add_teacher(TeacherSpec("t", (SignalSpec.of("logits", CODEC),), model={}))


def arrays(block: Block) -> dict[str, np.ndarray]:
    rows = np.random.default_rng([block.view, block.index]).normal(size=(len(block.rows), CLASSES)).astype(np.float32)
    return {f"logits/{name}": np.asarray(array) for name, array in CODEC.encode(rows).arrays.items()}


class Task(threading.Thread):
    """What `redistill.caching.run` does with its share of the blocks, without a teacher."""

    def __init__(self, path: Path, share: Share, clock: Clock, disk: float, speed: float) -> None:
        super().__init__(daemon=True)
        self.path, self.share, self.clock, self.speed = path, share, clock, speed
        self.files = SlowFiles(clock, disk)
        self.began = clock.turn(0.0)
        self.computed = self.lost = 0
        self.identity = ""
        self.sealed_at = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        self.began.wait()
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001  raised again by the main thread
            self.error = error
        self.clock.next()

    def work(self) -> None:
        writer = ArchiveWriter.resume(self.path, files=self.files)
        for block in self.share.work_order(writer.missing(PART)):  # all of them: every task starts with none
            self.clock.wait(self.files.seconds)  # to look for its record
            if writer.is_committed(block):
                continue
            self.clock.wait(BLOCK_SECONDS / self.speed)
            self.computed += 1
            self.lost += writer.write(block, arrays(block)) is None
        self.identity = writer.seal()
        self.sealed_at = self.clock.now


def simulate(folder: Path, tasks: int, blocks_per_task: int, disk: str, expected: str) -> dict[str, Any]:
    path, clock = folder / f"{disk}-{tasks}", Clock()
    create(path, tasks * blocks_per_task)
    speeds = np.exp(np.random.default_rng(tasks).normal(0, SPEED_DEVIATION, tasks))
    started = [Task(path, Share(i, tasks), clock, DISKS[disk], float(speed)) for i, speed in enumerate(speeds)]
    for task in started:
        task.start()
    clock.next()
    for task in started:
        task.join()
        if task.error is not None:
            raise task.error
    shutil.rmtree(path)
    seconds = min(task.sealed_at for task in started)
    blocks = tasks * blocks_per_task
    return {
        "name": f"{disk}, {tasks} tasks",
        "ratio": blocks * BLOCK_SECONDS / float(speeds.sum()) / seconds,
        "of_ideal": ideal_seconds(blocks, speeds) / seconds,
        "blocks": blocks,
        "computed_twice": sum(task.computed for task in started) - blocks,
        "races_lost": sum(task.lost for task in started),
        "seconds": seconds,
        "same_bytes": {task.identity for task in started} == {expected},
    }


def ideal_seconds(blocks: int, speeds: np.ndarray) -> float:
    """The time of a scheduler that costs nothing: the next block goes to the task that is free first."""
    ends = [(BLOCK_SECONDS / speed, BLOCK_SECONDS / speed) for speed in speeds.tolist()]
    heapq.heapify(ends)
    last = 0.0
    for _ in range(blocks):
        last, each = heapq.heappop(ends)
        heapq.heappush(ends, (last + each, each))
    return last


def written_alone(folder: Path, blocks: int) -> str:
    """The id of the archive that one process writes."""
    create(folder / "alone", blocks)
    writer = ArchiveWriter.resume(folder / "alone")
    for block in writer.missing(PART):
        writer.write(block, arrays(block))
    identity = writer.seal()
    shutil.rmtree(folder / "alone")
    return identity


def main() -> None:
    args = arguments(__doc__).parse_args()
    numbers, blocks_per_task = ((1, 8), 4) if args.quick else ((1, 8, 64), 20)
    rows = []
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        for tasks in numbers:
            expected = written_alone(Path(folder), tasks * blocks_per_task)
            rows += [simulate(Path(folder), tasks, blocks_per_task, disk, expected) for disk in DISKS]
    report("job_array", rows, args)


if __name__ == "__main__":
    main()
