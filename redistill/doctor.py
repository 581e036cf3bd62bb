"""What this machine can do: versions, devices, and a few short measurements that say what will limit training."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from redistill_cache import Archive, open_archive
from redistill_cache.errors import Refused
from redistill_cache.machine import usable_cores, usable_memory
from redistill_cache.storage import LOCAL, disk_trouble

from redistill.cached_teacher import decode_rows
from redistill.devices import one_thread, pick_device
from redistill.loading import default_workers, worker_context
from redistill.models import open_model
from redistill.signals import LOGITS
from redistill.sources.base import ObjectSource, Sample, Source
from redistill.sources.index import index_source
from redistill.sources.open_source import open_source
from redistill.views import DrawnViews, ViewDataset, parse_recipe
from redistill.views.view_params import archive_recipe

__all__ = ["Diagnosis", "examine"]

PACKAGES = ("redistill", "torch", "torchvision", "zarr", "numcodecs", "numpy", "pillow", "webdataset")
EXTRAS = ("timm", "wandb", "tensorboard")
DRAWN = "synthetic?n=64"
# Images that are looked at: rates need no more, and a large set should not be read for them.
IMAGES = 64
# Images below this side are shown as they are, others cropped and scaled.
SMALL = 64
SECONDS = 1.0
WRITTEN = 32 << 20
ROWS = 4096


@dataclass
class Diagnosis:
    """Facts, rates and advice. Rates that need data or an archive are None without."""

    versions: dict[str, str | None]
    python: str
    system: str
    cores: int
    """That may be kept busy: a container may be given the time of fewer than the machine has."""
    machine_cores: int
    memory_gib: float | None
    devices: list[str]
    worker_start: str
    workers: int
    disk_free_gib: float
    disk_write_mib_per_second: float
    data: str
    view_size: int
    views_per_second_and_core: float
    student: str
    student_images_per_second: float
    archive_load_rows_per_second: float | None = None
    archive_decode_rows_per_second: float | None = None
    limit: str = ""
    advice: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(data: str | None = None, archive: Path | None = None, folder: Path | None = None) -> Diagnosis:
    """Look at this machine for some seconds; `folder` is where archives would be written."""
    device = pick_device("auto")
    where = folder or Path.cwd()
    opened = None if archive is None else open_archive(archive)
    dataset = views_of(data or DRAWN, opened if data is not None else None)
    size = dataset.size
    student = "demo:small" if size < 64 else "torchvision:resnet18"
    found = Diagnosis(
        versions={name: version_of(name) for name in (*PACKAGES, *EXTRAS)},
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=usable_cores(),
        machine_cores=os.cpu_count() or 1,
        memory_gib=None if (memory := usable_memory()) is None else memory / 2**30,
        devices=devices(),
        worker_start=worker_context().get_start_method(),
        workers=default_workers(),
        disk_free_gib=free_gib(where),
        disk_write_mib_per_second=write_rate(where),
        data=data or "drawn images, as no --data was given",
        view_size=size,
        views_per_second_and_core=render_rate(dataset),
        student=student,
        student_images_per_second=student_rate(student, size, device),
    )
    if opened is not None:
        measure_archive(found, opened, device)
    conclude(found)
    return found


# -- facts ------------------------------------------------------------------------------------------------------------


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu"]
    return [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]


# -- rates ------------------------------------------------------------------------------------------------------------


def pace(work: Callable[[], int]) -> float:
    """Units a second of something that says how many units it did, repeated for about a second."""
    work()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        done += work()
    return done / (time.perf_counter() - start)


def free_gib(folder: Path) -> float:
    with disk_trouble("look at", folder):
        return shutil.disk_usage(folder).free / 2**30


def write_rate(folder: Path) -> float:
    """MiB/s of a durable write."""
    block = np.random.default_rng(0).integers(0, 256, WRITTEN, np.uint8).data
    with disk_trouble("write", folder), tempfile.TemporaryDirectory(dir=folder, prefix=".redistill-doctor-") as inside:
        start = time.perf_counter()
        LOCAL.publish(Path(inside) / "block", block)
        return WRITTEN / 2**20 / (time.perf_counter() - start)


@dataclass(frozen=True)
class Some:
    """A few samples of a source, from all over it."""

    source: Source

    def __len__(self) -> int:
        return min(IMAGES, len(self.source))

    def sample(self, i: int) -> Sample:
        return self.source.sample(i * len(self.source) // len(self))


def views_of(data: str, archive: Archive | None) -> ViewDataset:
    """Views as training would render them: by the archive's recipe, or the usual one for images of their size."""
    source = ObjectSource(Some(open_source(data)))
    if not len(source):
        raise Refused(f"{data} holds no image to measure with; name another --data, or none")
    index = index_source(source, workers=0)
    usual = "cifar" if index.sizes.max() < SMALL else "rrc"
    recipe = parse_recipe(usual) if archive is None else archive_recipe(archive)
    return ViewDataset(source, DrawnViews(index, recipe, seed=0, num_views=1))


def render_rate(dataset: ViewDataset) -> float:
    """Views a second on one core, as in a worker."""
    some = iter(np.resize(dataset.indices(0), 1 << 20).tolist())
    with one_thread():
        return pace(lambda: len(dataset.__getitems__([next(some) for _ in range(4)])))


def student_rate(student: str, size: int, device: torch.device) -> float:
    """Images a second through forward and backward of a usual student."""
    network = open_model(student, num_classes=100).module.to(device).train()
    batch = torch.zeros(32, 3, size, size, device=device)

    def step() -> int:
        network(batch).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return len(batch)

    return pace(step)


def measure_archive(found: Diagnosis, archive: Archive, device: torch.device) -> None:
    """Rows a second: loading a view from disk, and decoding rows of it on the device."""
    signals = [(name, signal.name) for name, teacher in archive.teachers.items() for signal in teacher.signals]
    if not signals:
        found.advice.append(f"{archive.path} holds no teacher's answers yet: redistill cache-teacher adds them")
        return
    name, signal = min(signals, key=lambda pair: pair[1] != LOGITS)  # logits where there are any
    start = time.perf_counter()
    view = archive.load_view(0, name, signal)
    found.archive_load_rows_per_second = len(view) / (time.perf_counter() - start)
    rows = np.random.default_rng(0).permutation(len(view))[:ROWS]

    def decode() -> int:
        decode_rows(view, rows, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return len(rows)

    found.archive_decode_rows_per_second = pace(decode)


# -- conclusions ------------------------------------------------------------------------------------------------------


def conclude(found: Diagnosis) -> None:
    """Which part is slowest, and what to do about it."""
    loader = found.views_per_second_and_core * found.workers
    rates = {"the loader": loader, "the student": found.student_images_per_second}
    if found.archive_decode_rows_per_second is not None:
        rates["decoding the archive"] = found.archive_decode_rows_per_second
    slowest = min(rates, key=lambda name: rates[name])
    found.limit = f"{slowest}: about {rates[slowest]:.0f} images/s"
    advice = found.advice
    if slowest == "the loader":
        advice.append("the loader limits training: train several students in one pass (--seed 0 --seed 1 ...)")
        advice.append("or show several views of a decoded image (--views-per-image 2), or store smaller images")
    if found.cores < found.machine_cores:
        advice.append(f"{found.cores} of {found.machine_cores} cores may be used here: more --workers would not help")
    if found.devices == ["cpu"]:
        advice.append("no GPU: stage 1 with a large teacher belongs on a machine that has one; archives travel")
    if found.memory_gib is not None and found.memory_gib < 4:
        advice.append(f"{found.memory_gib:.1f} GiB of memory: keep --workers low and --cache-memory below 1")
    if found.disk_free_gib < 5:
        advice.append(f"{found.disk_free_gib:.1f} GiB are free: see --dry-run for what an archive takes")
    missing = [name for name in EXTRAS if found.versions[name] is None]
    if missing:
        advice.append(f"not installed, and needed only if asked for: {', '.join(missing)}")
