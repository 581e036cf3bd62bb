"""Archives that move: python bench/remote.py [--quick] [--json PATH]

Training from an address: images/s with the archive on a server with 20 ms of latency, where every 100th request fails,
over images/s with the same archive on disk. The first epoch is not counted, runs alternate, each with an empty cache
folder, and a ratio is the median of the ratios of neighbouring runs; disk over disk is the control. Before the first
epoch with a view, the trainer compares it with its canaries, 32 images: 0.1 to 0.2 s. From disk this is done for all
views before the run, from an address for each view once it is here. A request that fails costs another second, so a
view may come too late for an epoch that is as short. Hence two lengths of an epoch: of one second, and four times as
long. An epoch over ImageNet takes minutes. The bytes are those that the server sent for a run of two epochs, over the
size of what it needs: the base and two views.

Moving: seconds and peak memory of commands of `redistill archive` on an archive of the size of ImageNet, 1,281,167 rows
of 1,000 classes in four views. It is written without a teacher: its blocks repeat encoded rows. Before each command,
`cp -r` copies the archive in the same folder, `tar cf` writes it to a tar, and `tar xf` reads that back to files;
`ratio` is the MB/s of the command over those of `cp -r`.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np
from archive import encoded_block, make_logits, make_spec
from loopback import served
from redistill_cache import ArchiveSpec, ArchiveWriter, SignalSpec, TeacherSpec, layout, open_archive, stream_archive
from redistill_cache.addresses import is_address
from redistill_cache.codecs import Codec, fit_codec
from redistill_cache.shards import encode_shard
from stage2 import Bench

from redistill.optim import OptimConfig

LATENCY, FAILURES = 0.020, 0.01
VIEWS = 4
MEMORY_GOAL = 500  # megabytes
# Runs a command of redistill and then prints the peak memory of its process.
COMMAND = """
import sys
import harness
from redistill_cli.__main__ import main
try:
    main()
finally:
    print("peak", harness.peak_memory(), file=sys.stderr)
"""


# -- training ---------------------------------------------------------------------------------------------------------


def training_rows(folder: Path, quick: bool) -> list[dict[str, Any]]:
    bench, rows = Bench(folder, quick), []
    for images in (1024, 2048) if quick else (8192, 32_768):
        data = f"synthetic?classes=10&n={images}"
        archive = bench.archive(f"served-{images}", data, VIEWS)
        with served(folder, latency=LATENCY, failures=FAILURES) as server:
            address = f"{server.address}/{archive.name}"
            remote, control = [], []
            for _ in range(1 if quick else 3):
                disk, distant, again = (pace(bench, data, place) for place in (str(archive), address, str(archive)))
                remote.append(distant / disk)
                control.append(again / disk)
            before = sum(server.bytes_sent().values())
            pace(bench, data, address, optim=OptimConfig(lr=0.01, epochs=2))
            sent = sum(server.bytes_sent().values()) - before
        files = open_archive(archive).state.files
        first_views = [e.size for name, e in files.items() if (view := layout.view_of_file(name)) is None or view < 2]
        needed = sum(first_views) + (archive / layout.MANIFEST).stat().st_size
        of = f"epochs of {images:,} images"
        rows += [
            {
                "name": f"images/s from an address over from disk, {of}",
                "ratio": statistics.median(remote),
                "goal": 0.95,
            },
            {"name": f"images/s from disk over from disk, {of}", "ratio": statistics.median(control), "goal": 1.0},
            {"name": f"bytes sent for two epochs over base and two views, {of}", "ratio": sent / needed, "goal": 1.02},
        ]
    return rows


def pace(bench: Bench, data: str, archive: str, **options: object) -> float:
    """Images/s of a run whose cache folder is empty."""
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(dir=bench.folder)
    streamed = stream_archive(archive) if is_address(archive) else None
    return bench.pace(data, Path(archive) if streamed is None else streamed.path, streamed, **options)


# -- moving -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repeated:
    """An archive whose blocks hold the same encoded rows."""

    spec: ArchiveSpec
    codec: Codec
    encoded: Mapping[str, np.ndarray]

    def begin(self, path: Path) -> ArchiveWriter:
        rows = self.spec.num_samples
        writer = ArchiveWriter.create(path, self.spec)
        digests = np.random.default_rng(0).integers(0, 256, (rows, 32), dtype=np.uint8)
        keys = [f"n{i // 1300:08d}/n{i // 1300:08d}_{i:07d}.JPEG" for i in range(rows)]
        labels = np.minimum(np.arange(rows) // 1300, self.spec.num_classes - 1)
        writer.write_samples(keys, labels, digests, np.full((rows, 2), 500, np.uint32))
        writer.add_teacher(TeacherSpec("net", (SignalSpec.of("logits", self.codec),)), {"logits": self.codec.side()})
        return writer

    def write(self, path: Path, share: int = 0, shares: int = 1) -> None:
        """All blocks, or every `shares`-th; sealed when none is missing. Equal rows are compressed once."""
        writer, compressed = self.begin(path), {}
        for part in ("views", "teachers/net"):
            arrays = layout.part_arrays(writer.spec, writer.teachers, part)
            for block in [*writer.missing(part)][share::shares]:
                count = len(block.rows)
                rows = {"crop": np.zeros((count, 4), np.int32)}
                rows |= {f"logits/{name}": values[:count] for name, values in self.encoded.items()}
                for name, array in arrays.items():
                    if (name, count) not in compressed:
                        compressed[name, count] = encode_shard(array, rows[name])
                files = [(a.shard_path(block.view, block.index), compressed[name, count]) for name, a in arrays.items()]
                writer.write_encoded(block, files)
        if shares == 1:
            writer.seal()


def moving_rows(folder: Path, quick: bool) -> list[dict[str, Any]]:
    rows, classes, block = (20_000, 100, 4096) if quick else (1_281_167, 1000, 65_536)
    known, fresh = make_logits(4096, classes, 1), make_logits(2048, classes, 2)
    codec = fit_codec("linear", known)
    repeated = Repeated(make_spec(rows, VIEWS, classes, block), codec, encoded_block(codec, fresh, block))
    whole = folder / "whole.redistill.zarr"
    repeated.write(whole)
    halves = [folder / f"half-{share}.redistill.zarr" for share in range(2)]
    for share, half in enumerate(halves):
        repeated.write(half, share, 2)
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    print(f"archive of {rows:,} rows, {size / 1e6:,.0f} MB", flush=True)
    measure = Moving(folder, whole, size)
    packed = folder / "whole.redistill"
    outcomes = [
        measure("pack", packed, "archive", "pack", str(whole), str(packed)),
        measure("copy", folder / "copy", "archive", "copy", str(whole), str(folder / "copy")),
        measure(
            "merge two halves",
            folder / "merged",
            "archive",
            "merge",
            *map(str, halves),
            "--out",
            str(folder / "merged"),
        ),
        measure("verify --full", None, "verify", "--full", str(whole)),
    ]
    with served(folder) as server:
        view = folder / "one-view"
        outcomes.append(
            measure(
                "fetch one view", view, "archive", "fetch", f"{server.address}/{packed.name}", str(view), "--views", "1"
            )
        )
    return outcomes


@dataclass(frozen=True)
class Moving:
    folder: Path
    whole: Path
    size: int

    def __call__(self, name: str, out: Path | None, *command: str) -> dict[str, Any]:
        """The speed of a command beside those of `cp` and `tar`, and its peak memory."""
        others = self.other_programs()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", COMMAND, *command], env=environment, stderr=subprocess.PIPE, text=True, check=False
        )
        seconds = time.perf_counter() - start
        if run.returncode:
            raise SystemExit(run.stderr)
        peak = int(run.stderr.rpartition("peak ")[2])
        moved = self.size if out is None else sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return {
            "name": name,
            "ratio": moved / seconds / 1e6 / others["cp_megabytes_per_second"],
            "megabytes": moved / 1e6,
            "megabytes_per_second": moved / seconds / 1e6,
            **others,
            "peak_memory_megabytes": peak / 1e6,
            "memory_goal": MEMORY_GOAL,
        }

    def other_programs(self) -> dict[str, float]:
        """Copying the archive, writing it to a tar, and reading that back."""
        copied, tar, read_back = (self.folder / name for name in ("cp", "whole.tar", "untar"))
        read_back.mkdir()
        commands = {
            "cp": ["cp", "-r", self.whole, copied],
            "tar": ["tar", "cf", tar, "-C", self.folder, self.whole.name],
            "untar": ["tar", "xf", tar, "-C", read_back],
        }
        speeds = {}
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True)
            os.sync()  # the commands of redistill sync what they write
            speeds[f"{name}_megabytes_per_second"] = self.size / (time.perf_counter() - start) / 1e6
        shutil.rmtree(copied)
        shutil.rmtree(read_back)
        tar.unlink()
        return speeds


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    with tempfile.TemporaryDirectory(prefix="redistill-bench-") as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        rows = moving_rows(folder, args.quick)
        harness.save("remote", rows, args)
        rows = [*training_rows(folder, args.quick), *rows]
    harness.report("remote", rows, args)


if __name__ == "__main__":
    main()
