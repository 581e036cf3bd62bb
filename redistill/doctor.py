"""Measure this machine: versions, devices, and a few short benchmarks that show what will limit training."""

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
from redistill.loading import default_workers, refuse_few_open_files, worker_context
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
DEFAULT_DATA = "synthetic?n=64"
# Images to measure with: more would not change the rates, and a large data set must not be read for them.
MAX_IMAGES = 64
# Images below this size are padded and cropped, others cropped and scaled.
SMALL_IMAGE = 64
SECONDS_PER_RATE = 1.0
BYTES_WRITTEN = 32 << 20
# What a torch DataLoader keeps there for each worker: by default two batches; with the batch size of `train`.
SHM, BATCHES_AHEAD, BATCH, COMMON_SIZE = Path("/dev/shm"), 2, 128, 224
ROWS_DECODED = 4096


@dataclass
class Diagnosis:
    """Facts, rates and advice. Rates that need an archive are None without one."""

    versions: dict[str, str | None]
    python: str
    system: str
    cores: int
    """Cores that this process may use: a container may be limited to fewer than the machine has."""
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
    shm_free_gib: float | None = None
    """In /dev/shm. Our workers do not need it; those of a user's own DataLoader do."""
    archive_load_rows_per_second: float | None = None
    archive_decode_rows_per_second: float | None = None
    limit: str = ""
    advice: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(data: str | None = None, archive: Path | None = None, folder: Path | None = None) -> Diagnosis:
    """Measure for a few seconds; `folder` is where archives would be written, by default the current one."""
    device = pick_device("auto")
    folder = folder or Path.cwd()
    opened = None if archive is None else open_archive(archive)
    dataset = open_views(data or DEFAULT_DATA, opened if data is not None else None)
    size = dataset.size
    student = "demo:small" if size < SMALL_IMAGE else "torchvision:resnet18"
    diagnosis = Diagnosis(
        versions={name: version_of(name) for name in (*PACKAGES, *EXTRAS)},
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=usable_cores(),
        machine_cores=os.cpu_count() or 1,
        memory_gib=None if (memory := usable_memory()) is None else memory / 2**30,
        devices=device_names(),
        worker_start=worker_context().get_start_method(),
        workers=default_workers(),
        disk_free_gib=free_gib(folder),
        disk_write_mib_per_second=write_rate(folder),
        data=data or "synthetic images; use --data for others",
        view_size=size,
        views_per_second_and_core=render_rate(dataset),
        student=student,
        student_images_per_second=student_rate(student, size, device),
        shm_free_gib=free_gib(SHM) if SHM.is_dir() else None,
    )
    if opened is not None:
        measure_archive(diagnosis, opened, device)
    add_advice(diagnosis)
    return diagnosis


# -- facts ------------------------------------------------------------------------------------------------------------


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_names() -> list[str]:
    if not torch.cuda.is_available():
        return ["cpu"]
    return [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]


def free_gib(folder: Path) -> float:
    with disk_trouble("read", folder):
        return shutil.disk_usage(folder).free / 2**30


# -- rates ------------------------------------------------------------------------------------------------------------


def rate_of(step: Callable[[], int]) -> float:
    """Items per second of `step`, which returns how many items it processed; repeated for about a second."""
    step()
    start, items = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS_PER_RATE:
        items += step()
    return items / (time.perf_counter() - start)


def write_rate(folder: Path) -> float:
    """MiB/s of a durable write."""
    block = np.random.default_rng(0).integers(0, 256, BYTES_WRITTEN, np.uint8).data
    with disk_trouble("write", folder), tempfile.TemporaryDirectory(dir=folder, prefix=".redistill-doctor-") as inside:
        start = time.perf_counter()
        LOCAL.publish(Path(inside) / "block", block)
        return BYTES_WRITTEN / 2**20 / (time.perf_counter() - start)


@dataclass(frozen=True)
class Subset:
    """A few samples of a source, evenly spread over it."""

    source: Source

    def __len__(self) -> int:
        return min(MAX_IMAGES, len(self.source))

    def sample(self, i: int) -> Sample:
        return self.source.sample(i * len(self.source) // len(self))


def open_views(data: str, archive: Archive | None) -> ViewDataset:
    """Views as in training: with the archive's recipe, or the default one for the size of the images."""
    source = ObjectSource(Subset(open_source(data)))
    if not len(source):
        raise Refused(f"{data} has no images; use another --data, or omit it")
    index = index_source(source, workers=0)
    default_recipe = "cifar" if index.sizes.max() < SMALL_IMAGE else "rrc"
    recipe = parse_recipe(default_recipe) if archive is None else archive_recipe(archive)
    return ViewDataset(source, DrawnViews(index, recipe, seed=0, num_views=1))


def render_rate(dataset: ViewDataset) -> float:
    """Views per second on one core, as in a worker."""
    indices = iter(np.resize(dataset.indices(0), 1 << 20).tolist())
    with one_thread():
        return rate_of(lambda: len(dataset.__getitems__([next(indices) for _ in range(4)])))


def student_rate(student: str, size: int, device: torch.device) -> float:
    """Images per second through forward and backward of a typical student."""
    network = open_model(student, num_classes=100).module.to(device).train()
    batch = torch.zeros(32, 3, size, size, device=device)

    def step() -> int:
        network(batch).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return len(batch)

    return rate_of(step)


def measure_archive(diagnosis: Diagnosis, archive: Archive, device: torch.device) -> None:
    """Rows per second: loading a view from disk, and decoding rows of it on the device."""
    signals = [(name, signal) for name in archive.teachers for signal in archive.signals_of(name)]
    if not signals:
        diagnosis.advice.append(f"{archive.path} has no teacher yet; add one with redistill cache-teacher")
        return
    name, signal = min(signals, key=lambda pair: pair[1] != LOGITS)  # logits if there are any
    start = time.perf_counter()
    view = archive.load_view(0, name, signal)
    diagnosis.archive_load_rows_per_second = len(view) / (time.perf_counter() - start)
    rows = np.random.default_rng(0).permutation(len(view))[:ROWS_DECODED]

    def decode() -> int:
        decode_rows(view, rows, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return len(rows)

    diagnosis.archive_decode_rows_per_second = rate_of(decode)


# -- advice -----------------------------------------------------------------------------------------------------------


def add_advice(diagnosis: Diagnosis) -> None:
    """Find the bottleneck and suggest what to change."""
    rates = {
        "rendering": diagnosis.views_per_second_and_core * diagnosis.workers,
        "student": diagnosis.student_images_per_second,
    }
    if diagnosis.archive_decode_rows_per_second is not None:
        rates["decoding"] = diagnosis.archive_decode_rows_per_second
    slowest = min(rates, key=lambda name: rates[name])
    diagnosis.limit = f"{slowest}, about {rates[slowest]:.0f} images/s"
    advice = diagnosis.advice
    if slowest == "rendering":
        advice.append("rendering is the bottleneck: train several students in one pass (--seed 0 --seed 1 ...)")
        advice.append("or use several views of each decoded image (--views-per-image 2), or store smaller images")
    if diagnosis.cores < diagnosis.machine_cores:
        advice.append(
            f"only {diagnosis.cores} of {diagnosis.machine_cores} cores may be used; more --workers will not help"
        )
    if diagnosis.devices == ["cpu"]:
        advice.append(
            "no GPU: run cache-teacher on a machine with one if the teacher is large, and copy the archive here"
        )
    if diagnosis.memory_gib is not None and diagnosis.memory_gib < 4:
        advice.append(f"{diagnosis.memory_gib:.1f} GiB of memory: use few --workers, and --cache-memory below 1")
    if diagnosis.disk_free_gib < 5:
        advice.append(f"{diagnosis.disk_free_gib:.1f} GiB free: cache-teacher --dry-run estimates an archive's size")
    size = max(diagnosis.view_size, COMMON_SIZE)  # without --data, the views measured are small
    needed_gib = diagnosis.workers * BATCHES_AHEAD * BATCH * 3 * size**2 / 2**30
    if diagnosis.shm_free_gib is not None and diagnosis.shm_free_gib < needed_gib:
        advice.append(
            f"{SHM} has {diagnosis.shm_free_gib:.2f} GiB free; a DataLoader of your own with {diagnosis.workers} "
            f"workers and batches of {BATCH} views of {size} px needs {needed_gib:.2f}: start the container with a "
            "larger --shm-size, or use fewer workers; cache-teacher and train do not use it"
        )
    try:
        refuse_few_open_files(diagnosis.workers)
    except Refused as error:
        advice.append(str(error))
    missing = [name for name in EXTRAS if diagnosis.versions[name] is None]
    if missing:
        advice.append(f"optional packages not installed: {', '.join(missing)}")
