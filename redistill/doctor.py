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
from redistill_cache import open_archive
from redistill_cache.files import LOCAL

from redistill.devices import pick_device
from redistill.loading import default_workers, worker_context
from redistill.models import open_model
from redistill.sources.index import index_source
from redistill.sources.opening import open_source
from redistill.training.targets import decode_on
from redistill.views import DrawnViews, ViewDataset, parse_recipe

__all__ = ["Diagnosis", "examine"]

PACKAGES = ("redistill", "torch", "torchvision", "zarr", "numcodecs", "numpy", "pillow", "webdataset")
EXTRAS = ("timm", "wandb", "tensorboard")
DRAWN = "synthetic?n=64"
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
    dataset = views_of(data or DRAWN, archive)
    size = dataset.size
    student = "demo:small" if size < 64 else "torchvision:resnet18"
    found = Diagnosis(
        versions={name: version_of(name) for name in (*PACKAGES, *EXTRAS)},
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)),
        memory_gib=memory_gib(),
        devices=devices(),
        worker_start=worker_context().get_start_method(),
        workers=default_workers(),
        disk_free_gib=shutil.disk_usage(where).free / 2**30,
        disk_write_mib_per_second=write_rate(where),
        data=data or "drawn images, as no --data was given",
        view_size=size,
        views_per_second_and_core=render_rate(dataset),
        student=student,
        student_images_per_second=student_rate(student, size, device),
    )
    if archive is not None:
        found.archive_load_rows_per_second, found.archive_decode_rows_per_second = archive_rates(archive, device)
    conclude(found)
    return found


# -- facts ------------------------------------------------------------------------------------------------------------


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def memory_gib() -> float | None:
    """What this process may use: the container's limit where it has one."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        total = min(total, int(text))
    return total / 2**30


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


def write_rate(folder: Path) -> float:
    """MiB/s of a durable write."""
    block = np.random.default_rng(0).integers(0, 256, WRITTEN, np.uint8).data
    with tempfile.TemporaryDirectory(dir=folder, prefix=".redistill-doctor-") as inside:
        start = time.perf_counter()
        LOCAL.publish(Path(inside) / "block", block)
        return WRITTEN / 2**20 / (time.perf_counter() - start)


def views_of(data: str, archive: Path | None) -> ViewDataset:
    """Views as training would render them: the archive's, or the usual recipe."""
    source = open_source(data)
    if archive is not None and data != DRAWN:
        return ViewDataset(source, open_archive(archive))
    recipe = parse_recipe("cifar" if data == DRAWN else "rrc")
    return ViewDataset(source, DrawnViews(index_source(source), recipe, seed=0, num_views=1))


def render_rate(dataset: ViewDataset) -> float:
    """Views a second on one core, as in a worker."""
    rows = dataset.indices(0)
    step = max(1, len(rows) // 64)
    some = iter(np.resize(rows[::step], 1 << 20).tolist())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return pace(lambda: len(dataset.__getitems__([next(some) for _ in range(4)])))
    finally:
        torch.set_num_threads(before)


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


def archive_rates(path: Path, device: torch.device) -> tuple[float, float]:
    """Rows a second: loading a view from disk, and decoding rows of it on the device."""
    archive = open_archive(path)
    name = next(iter(archive.teachers))
    start = time.perf_counter()
    view = archive.load_view(0, name)
    loaded = len(view) / (time.perf_counter() - start)
    rows = np.random.default_rng(0).permutation(len(view))[:ROWS]

    def decode() -> int:
        decode_on(view.codec, view.gather(rows), device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return len(rows)

    return loaded, pace(decode)


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
    if found.devices == ["cpu"]:
        advice.append("no GPU: stage 1 with a large teacher belongs on a machine that has one; archives travel")
    if found.memory_gib is not None and found.memory_gib < 4:
        advice.append(f"{found.memory_gib:.1f} GiB of memory: keep --workers low and --cache-memory below 1")
    if found.disk_free_gib < 5:
        advice.append(f"{found.disk_free_gib:.1f} GiB are free: see --dry-run for what an archive takes")
    missing = [name for name in EXTRAS if found.versions[name] is None]
    if missing:
        advice.append(f"not installed, and needed only if asked for: {', '.join(missing)}")
