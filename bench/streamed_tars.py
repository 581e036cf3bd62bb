"""The cost of streaming tars compared with a folder of the same images: python bench/streamed_tars.py [--quick]

local tars over a folder    images/s of training from tars on this disk with stream=1, over a folder of the same images
tars of a server over it    the same from a server on loopback that waits 20 ms before every answer and refuses 1 % of
                            them, with room for half of the tars: a window of a quarter, and the next one
tar by tar over a folder    with windows of one tar, shorter than what is loaded ahead, and room for a third of the tars
controls                    the folder over itself; the folder while a bare download of as many bytes a second runs
                            beside it, over itself. Both cores are busy with rendering, so every byte that is received
                            costs speed, whoever receives it; and server and trainer share the cores here
1,000 tars over 100         peak memory of a streamed run of the same images in ten times as many tars

The runs that are compared alternate, as in stage2.py, and the first epoch is not counted. The tars were indexed before.
Two workers are given 1,024 images ahead, and a window of real tars, 4 GiB, holds many times as many. So there are
enough images for windows of 1,500; an epoch takes some ten seconds. `fetched` is the bytes that the server sent over
those of one transfer of every tar an epoch.
"""

from __future__ import annotations

import http.client
import io
import multiprocessing
import os
import random
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import harness
from loopback import Server, served
from stage2 import Bench

from redistill.optim import OptimConfig
from redistill.sources.open_source import open_source

GIB = 1 << 30
LATENCY, FAILURES = 0.020, 0.01
EPOCHS, TURNS = 3, 3


@dataclass(frozen=True)
class Tars:
    """The images of a folder of class folders as so many tars, in a random order."""

    folder: Path
    count: int
    largest: int
    size: int

    @classmethod
    def pack(cls, folder: str, out: Path, count: int) -> Tars:
        root = Path(folder.removeprefix("folder:"))
        files = sorted(root.rglob("*.jpg"))
        random.Random(0).shuffle(files)
        labels = {name: label for label, name in enumerate(sorted(path.name for path in root.iterdir()))}
        out.mkdir()
        for number in range(count):
            with tarfile.open(out / f"{number:04d}.tar", "w") as tar:
                for file in files[number::count]:
                    key, label = f"{file.parent.name}/{file.stem}", b"%d" % labels[file.parent.name]
                    for name, data in ((f"{key}.jpg", file.read_bytes()), (f"{key}.cls", label)):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
        sizes = [path.stat().st_size for path in out.iterdir()]
        return cls(out, count, max(sizes), sum(sizes))

    def at(self, server: Server, window: int, room: int) -> dict[str, Any]:
        """Options of a run that has room for so many of the tars."""
        pattern = f"{{0000..{self.count - 1:04d}}}.tar"
        data = f"wds:{server.address}/{pattern}?stream=1&window={window}"
        return {"data": data, "stream_cache": room * self.largest / GIB}


def speed(bench: Bench, folder: str, archive: Path, tars: Tars) -> list[dict[str, Any]]:
    images = sum(1 for _ in Path(folder.removeprefix("folder:")).rglob("*.jpg"))
    common: dict[str, Any] = {"archive": archive, "workers": 2, "optim": OptimConfig(lr=0.01, epochs=EPOCHS)}
    plain, window = common | {"data": folder}, tars.count // 4
    local = common | {"data": f"wds:{tars.folder}?stream=1&window={window}"}
    rows = [
        {"name": "control: a folder over itself", "goal": 1.0, **bench.compare(plain, plain)},
        {"name": "local tars over a folder", "goal": 0.97, **bench.compare(local, plain)},
    ]
    with served(tars.folder, latency=LATENCY, failures=FAILURES) as server:
        rows.append(beside_downloads(bench, plain, server, tars, tars.size / images))
        for name, tars_of_window, room in (
            ("tars of a server over a folder", window, 2 * window),
            ("tar by tar of a server over a folder", 1, tars.count // 3),
        ):
            remote = common | tars.at(server, tars_of_window, room)
            open_source(remote["data"], stream_cache=remote["stream_cache"])
            before = sum(server.bytes_sent().values())
            row = {"name": name, "goal": 0.95, **bench.compare(remote, plain, TURNS)}
            sent = sum(server.bytes_sent().values()) - before
            needed = tars.size * EPOCHS * (1 if bench.quick else TURNS)
            rows.append(row | {"fetched": sent / needed})
    return rows


def beside_downloads(
    bench: Bench, plain: dict[str, Any], server: Server, tars: Tars, bytes_per_image: float
) -> dict[str, Any]:
    ratios = []
    for _ in range(1 if bench.quick else TURNS):
        alone = bench.pace(**plain)
        with downloading(server, tars, alone * bytes_per_image):
            ratios.append(bench.pace(**plain) / alone)
    return {"name": "control: a folder beside bare downloads", "ratio": statistics.median(ratios)}


@contextmanager
def downloading(server: Server, tars: Tars, bytes_per_second: float) -> Iterator[None]:
    """Another process downloads the tars, one after the other, and writes them to the disk."""
    process = multiprocessing.get_context("spawn").Process(
        target=download_again_and_again, args=(server.address, tars, bytes_per_second), daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def download_again_and_again(address: str, tars: Tars, bytes_per_second: float) -> None:
    begun, received = time.monotonic(), 0
    while True:
        for path in sorted(tars.folder.iterdir()):
            connection = http.client.HTTPConnection(urlsplit(address).netloc)
            connection.request("GET", f"/{path.name}")
            answer = connection.getresponse()
            with tempfile.TemporaryFile() as file:
                shutil.copyfileobj(answer, file, 1 << 18)
                received += file.tell()
            connection.close()
            time.sleep(max(0.0, begun + received / bytes_per_second - time.monotonic()))


def peak_of_run(bench: Bench, archive: Path, options: dict[str, Any]) -> int:
    bench.pace(str(options["data"]), archive, stream_cache=options["stream_cache"])
    return harness.peak_memory()


def memory(bench: Bench, folder: str, archive: Path, few: int) -> dict[str, Any]:
    peaks = []
    for count in (few, 10 * few):
        tars = Tars.pack(folder, bench.folder / f"tars-{count}", count)
        with (
            served(tars.folder, latency=LATENCY, failures=FAILURES) as server,
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone,
        ):
            options = tars.at(server, count // 4, count // 2)
            peaks.append(alone.submit(peak_of_run, bench, archive, options).result())
            bench.runs += 1  # the process has counted its own
    return {"name": f"{10 * few} tars over {few}, peak memory", "goal": 1.0, "ratio": peaks[1] / peaks[0]}


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        bench = Bench(Path(scratch), args.quick)
        folder = bench.jpegs(240 if args.quick else 6000)
        archive = bench.archive("photos", folder, 2, recipe="rrc?size=64")
        rows = speed(bench, folder, archive, Tars.pack(folder, Path(scratch) / "tars", 12 if args.quick else 24))
        rows.append(memory(bench, folder, archive, 10 if args.quick else 100))
    harness.report("streamed_tars", rows, args)


if __name__ == "__main__":
    main()
