"""The cost of streaming tars compared with a folder of the same images: python bench/streamed_tars.py [--quick]

local tars over a folder    images/s of training from tars on this disk with stream=1, over a folder of the same images
tars of a server over it    the same from a server on loopback that waits 20 ms before every answer and refuses 1 % of
                            them, with room for a third of the tars
control                     the folder over itself
1,000 tars over 100         peak memory of a streamed run of the same images in ten times as many tars

The runs that are compared alternate, as in stage2.py, and the first epoch is not counted. The tars were indexed before.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import harness
from loopback import served
from stage2 import Bench

GIB = 1 << 30
LATENCY, FAILURES = 0.020, 0.01


def pack(folder: str, out: Path, tars: int) -> int:
    """The images of a folder of class folders as so many tars, in a random order; the size of the largest."""
    root = Path(folder.removeprefix("folder:"))
    files = sorted(root.rglob("*.jpg"))
    random.Random(0).shuffle(files)
    labels = {name: label for label, name in enumerate(sorted(path.name for path in root.iterdir()))}
    out.mkdir()
    for number in range(tars):
        with tarfile.open(out / f"{number:04d}.tar", "w") as tar:
            for file in files[number::tars]:
                key = f"{file.parent.name}/{file.stem}"
                for name, data in ((f"{key}.jpg", file.read_bytes()), (f"{key}.cls", b"%d" % labels[file.parent.name])):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return max(path.stat().st_size for path in out.iterdir())


def streamed(address: str, tars: int, window: int, room: int) -> dict[str, object]:
    return {"data": f"wds:{address}/{{0000..{tars - 1:04d}}}.tar?stream=1&window={window}", "stream_cache": room / GIB}


def speed(bench: Bench, folder: str, archive: Path, tars: int) -> list[dict[str, object]]:
    out = bench.folder / "tars"
    largest = pack(folder, out, tars)
    plain, window = {"data": folder, "archive": archive}, max(1, tars // 6)
    local = {"data": f"wds:{out}?stream=1&window={window}", "archive": archive}
    rows = [
        {"name": "control: a folder over itself", "goal": 1.0, **bench.compare(plain, plain)},
        {"name": "local tars over a folder", "goal": 0.97, **bench.compare(local, plain)},
    ]
    with served(out, latency=LATENCY, failures=FAILURES) as server:
        remote = streamed(server.address, tars, window, 2 * window * largest) | {"archive": archive}
        rows.append({"name": "tars of a server over a folder", "goal": 0.95, **bench.compare(remote, plain)})
    return rows


def peak_of_run(bench: Bench, archive: Path, options: dict[str, object]) -> int:
    bench.pace(str(options["data"]), archive, stream_cache=options["stream_cache"])
    return harness.peak_memory()


def memory(bench: Bench, folder: str, archive: Path, few: int) -> dict[str, object]:
    peaks = []
    for tars in (few, 10 * few):
        out = bench.folder / f"tars-{tars}"
        largest = pack(folder, out, tars)
        with (
            served(out, latency=LATENCY, failures=FAILURES) as server,
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone,
        ):
            options = streamed(server.address, tars, tars // 10, tars // 5 * largest)
            peaks.append(alone.submit(peak_of_run, bench, archive, options).result())
            bench.runs += 1  # the process has counted its own
    return {"name": f"{10 * few} tars over {few}, peak memory", "goal": 1.0, "ratio": peaks[1] / peaks[0]}


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        bench = Bench(Path(scratch), args.quick)
        folder = bench.jpegs(120 if args.quick else 1000)
        archive = bench.archive("photos", folder, 2, recipe="rrc?size=64")
        rows = speed(bench, folder, archive, 12 if args.quick else 24)
        rows.append(memory(bench, folder, archive, 10 if args.quick else 100))
    harness.report("streamed_tars", rows, args)


if __name__ == "__main__":
    main()
