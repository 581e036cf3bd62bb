"""Measure this machine: versions, devices, and a few short benchmarks that show what will limit training."""

from __future__ import annotations

import errno
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from redistill_cache import Archive, open_archive
from redistill_cache.codecs import fit_codec, join_encoded
from redistill_cache.codecs.catalogue import compressed_size
from redistill_cache.errors import Refused
from redistill_cache.machine import usable_cores, usable_memory
from redistill_cache.storage import EXCLUSIVE_RENAME, HARD_LINKS, LOCAL, Files, disk_trouble

from redistill.cached_teacher import decode_rows
from redistill.devices import one_thread, pick_amp, pick_device, refuse_out_of_memory
from redistill.loading import default_workers, refuse_few_open_files, worker_context
from redistill.models import OpenedModel, open_model
from redistill.signals import LOGITS
from redistill.sources.base import ObjectSource, Sample, Source, in_any_order
from redistill.sources.index import index_source
from redistill.sources.open_source import open_source
from redistill.teachers import Teacher
from redistill.views import DrawnViews, ViewDataset, parse_recipe
from redistill.views.view_params import archive_recipe

__all__ = ["Diagnosis", "Stage", "balance", "examine"]

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
# A first batch shows how long one takes; the batch of a run is measured if it takes at most this long.
FIRST_BATCH, SECONDS_PER_BATCH = 8, 2.0
# The encoder is measured on random logits of at most this many classes and this rank.
MOST_CLASSES, MOST_RANK, ROWS_ENCODED = 1000, 512, 1024


@dataclass(frozen=True)
class Stage:
    """What a stage would run at on this machine, and why."""

    images_per_second: float
    limit: str
    """The name of the rate that limits it."""
    rates: dict[str, float]
    """Images per second of each part alone: the loader with all workers or cores, the others with the whole device."""
    workers: int
    """Rendering processes with which the loader keeps up with the other parts, or takes its share of the cores."""


@dataclass
class Diagnosis:
    """Facts, rates and advice. Rates that need an archive or a teacher are None without one."""

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
    file_system: dict[str, str | None]
    """What writing an archive needs of the file system, and the error where it lacks it."""
    commits_by: str | None
    """Which of two of these decides the winner of a race; None if there is neither, and no archive can be written."""
    data: str
    view_size: int
    views_per_second_and_core: float
    student: str
    student_images_per_second: float
    student_batch: int
    """Below that of training where that would take too long to measure."""
    precision: str
    """In which networks would run here by default."""
    shm_free_gib: float | None = None
    """In /dev/shm. Our workers do not need it; those of a user's own DataLoader do."""
    archive_load_rows_per_second: float | None = None
    archive_decode_rows_per_second: float | None = None
    teacher: str | None = None
    teacher_images_per_second: float | None = None
    teacher_batch: int | None = None
    encoded_rows_per_second: float | None = None
    """Logits of as many classes as the teacher's, random ones: on a CPU, of one core."""
    encoded_bytes_per_row: float | None = None
    stage1: Stage | None = None
    stage2: Stage | None = None
    limit: str = ""
    advice: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(
    data: str | None = None,
    archive: Path | None = None,
    folder: Path | None = None,
    *,
    teacher: str | None = None,
    student: str | None = None,
    allow_python: bool = False,
) -> Diagnosis:
    """Measure for up to half a minute; `folder` is where archives would be written, by default the current one."""
    device = pick_device("auto")
    folder = folder or Path.cwd()
    disk_free = free_gib(folder)
    opened = None if archive is None else open_archive(archive)
    network = None if teacher is None else open_model(teacher, allow_python=allow_python)
    size = None if network is None else network.view_size
    dataset = open_views(data or DEFAULT_DATA, opened if data is not None else None, size)
    size = dataset.size
    student = student or ("demo:small" if size < SMALL_IMAGE else "torchvision:resnet18")
    amp = pick_amp(device, None)
    student_rate, student_batch = time_student(student, size, device, allow_python=allow_python)
    file_system = try_file_system(folder)
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
        disk_free_gib=disk_free,
        disk_write_mib_per_second=write_rate(folder),
        file_system=file_system,
        commits_by=commits_by(file_system),
        data=data or "synthetic images; use --data for others",
        view_size=size,
        views_per_second_and_core=render_rate(dataset),
        student=student,
        student_images_per_second=student_rate,
        student_batch=student_batch,
        precision=str(amp or torch.float32).removeprefix("torch."),
        shm_free_gib=free_gib(SHM) if SHM.is_dir() else None,
    )
    if network is not None:
        measure_teacher(diagnosis, network, size, device)
    if opened is not None:
        measure_archive(diagnosis, opened, device)
    add_stages(diagnosis, device)
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


def try_file_system(folder: Path, files: Files = LOCAL) -> dict[str, str | None]:
    """What the writer of an archive does, tried in a temporary folder: None, or the error where it does not work."""
    found: dict[str, str | None] = {}
    with disk_trouble("write", folder), tempfile.TemporaryDirectory(dir=folder, prefix=".redistill-doctor-") as inside:
        one, two, link, moved, target = (Path(inside) / name for name in ("one", "two", "link", "moved", "target"))
        files.write(one, b"1")
        files.write(two, b"2")

        def refuse_existing() -> None:
            with suppress(FileExistsError):
                files.write(one, b"3")
                raise OSError(errno.EEXIST, "an existing file is opened")

        def refuse_second_link() -> None:
            files.link(one, link)
            with suppress(FileExistsError):
                files.link(two, link)
                raise OSError(errno.EEXIST, "a link replaces a file")

        def refuse_rename_over_a_file() -> None:
            files.write(moved, b"4")
            files.rename_exclusively(moved, target)
            with suppress(FileExistsError):
                files.rename_exclusively(two, target)
                raise OSError(errno.EEXIST, "a rename replaces a file")

        operations: dict[str, Callable[[], None]] = {
            "exclusive create": refuse_existing,
            HARD_LINKS: refuse_second_link,
            EXCLUSIVE_RENAME: refuse_rename_over_a_file,
            "rename over a file": lambda: files.rename(two, one),
            "fsync of a file": lambda: files.sync_file(one),
            "fsync of a folder": lambda: files.sync_directory(Path(inside)),
        }
        for name, operation in operations.items():
            try:
                operation()
                found[name] = None
            except OSError as error:
                found[name] = error.strerror or str(error)
    return found


def commits_by(file_system: Mapping[str, str | None]) -> str | None:
    """What the writer of an archive uses of what was tried."""
    return next((name for name in (HARD_LINKS, EXCLUSIVE_RENAME) if file_system[name] is None), None)


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


def open_views(data: str, archive: Archive | None, size: int | None = None) -> ViewDataset:
    """Views as in training: with the archive's recipe, or the default one for the size of the images or of views."""
    source = ObjectSource(Subset(in_any_order(open_source(data))))
    if not len(source):
        raise Refused(f"{data} has no images; use another --data, or omit it")
    index = index_source(source, workers=0)
    default_recipe = "cifar" if (size or index.sizes.max()) < SMALL_IMAGE else "rrc"
    if size is not None:
        default_recipe += f"?size={size}"
    recipe = parse_recipe(default_recipe) if archive is None else archive_recipe(archive)
    return ViewDataset(source, DrawnViews(index, recipe, seed=0, num_views=1))


def render_rate(dataset: ViewDataset) -> float:
    """Views per second on one core, as in a worker."""
    indices = iter(np.resize(dataset.indices(0), 1 << 20).tolist())
    with one_thread():
        return rate_of(lambda: len(dataset.__getitems__([next(indices) for _ in range(4)])))


def paced(run: Callable[[int], None], device: torch.device) -> tuple[float, int]:
    """Items per second of `run(batch)`, and the batch: that of a run, or fewer where that would take seconds."""

    def finish(batch: int) -> int:
        run(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return batch

    batch = FIRST_BATCH
    finish(batch)  # chooses kernels, allocates memory
    start = time.perf_counter()
    finish(batch)
    affordable = int(batch * SECONDS_PER_BATCH / (time.perf_counter() - start))
    batch = min(BATCH, max(batch, affordable))
    with refuse_out_of_memory(batch, device):
        return rate_of(lambda: finish(batch)), batch


def time_student(student: str, size: int, device: torch.device, *, allow_python: bool) -> tuple[float, int]:
    """Images per second through forward and backward, in the precision of training."""
    model = open_model(student, num_classes=100, allow_python=allow_python)
    network, amp = model.module.to(device).train(), pick_amp(device, None)
    pixels = torch.zeros(BATCH, 3, size, size, device=device)

    def step(batch: int) -> None:
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            loss = network(pixels[:batch]).sum()
        loss.backward()

    return paced(step, device)


def measure_teacher(diagnosis: Diagnosis, model: OpenedModel, size: int, device: torch.device) -> None:
    """The teacher's forward pass as in stage 1, and encoding and compressing its number of classes."""
    teacher = Teacher(model, device=device, amp=pick_amp(device, None))
    pixels = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8, device=device)

    def forward(batch: int) -> None:
        teacher(pixels[:batch])

    diagnosis.teacher = model.spec
    diagnosis.teacher_images_per_second, diagnosis.teacher_batch = paced(forward, device)
    # Fitting many classes takes minutes; the time of a row grows about as their number.
    classes = min(model.num_classes, MOST_CLASSES)
    share = classes / model.num_classes
    rng = np.random.default_rng(0)
    rank = min(classes, MOST_RANK)
    basis = rng.normal(size=(rank, classes)) * (4.0 / np.arange(1, rank + 1) ** 0.8)[:, None]
    logits = (rng.normal(size=(2 * ROWS_ENCODED, rank)) @ basis).astype(np.float32)
    codec = fit_codec("auto" if classes <= SMALL_IMAGE else "linear", logits[:ROWS_ENCODED])
    rows = logits[ROWS_ENCODED:] if device.type != "cuda" else torch.from_numpy(logits[ROWS_ENCODED:]).to(device)
    codec.encode(rows[:FIRST_BATCH])
    clock = time.perf_counter if device.type == "cuda" else time.process_time  # a CPU's cores have other work as well
    start = clock()
    encoded = join_encoded([codec.encode(rows)])
    diagnosis.encoded_bytes_per_row = compressed_size(codec, encoded) / share
    diagnosis.encoded_rows_per_second = len(encoded) / (clock() - start) * share


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


def balance(rates: Mapping[str, float], *, cores: int, workers: int, shared: bool, apart: Mapping[str, float]) -> Stage:
    """What a stage runs at.

    `rates` are images per second: of the loader on one core, of the others on the whole device, one after the other on
    it. Without a GPU, the loader's processes and all others share the cores (`shared`). `apart` are rates of parts that
    run beside all of these.
    """
    loader = rates["loader"]
    others = {name: 1.0 / rate for name, rate in rates.items() if name != "loader"}
    busy = sum(others.values())
    if shared:
        seconds = others | {"loader": 1.0 / (loader * cores)}
        pace = 1.0 / sum(seconds.values())
        limit = max(seconds, key=lambda name: seconds[name])
        balanced = max(1, round(cores * seconds["loader"] * pace))
        shown = dict(rates) | {"loader": loader * cores}
    else:
        balanced = math.ceil(1.0 / (busy * loader))
        pace = min(loader * workers, 1.0 / busy)
        limit = "loader" if loader * workers < 1.0 / busy else max(others, key=lambda name: others[name])
        shown = dict(rates) | {"loader": loader * workers}
    slowest = min(apart, key=lambda name: apart[name], default=None)
    if slowest is not None and apart[slowest] < pace:
        pace, limit = apart[slowest], slowest
    return Stage(pace, limit, shown | dict(apart), balanced)


def add_stages(diagnosis: Diagnosis, device: torch.device) -> None:
    """Stage 1 for the teacher, if there is one, and stage 2 for the student."""
    d, shared = diagnosis, device.type == "cpu"
    stage = partial(balance, cores=d.cores, workers=d.workers, shared=shared)
    if d.teacher_images_per_second and d.encoded_rows_per_second and d.encoded_bytes_per_row:
        encoder = d.encoded_rows_per_second * (d.cores if shared else 1)
        rates = {"loader": d.views_per_second_and_core, "teacher": d.teacher_images_per_second, "encoder": encoder}
        disk = d.disk_write_mib_per_second * 2**20 / d.encoded_bytes_per_row
        d.stage1 = stage(rates, apart={"disk": disk})
    rates = {"loader": d.views_per_second_and_core, "student": d.student_images_per_second}
    if d.archive_decode_rows_per_second is not None:
        rates["decoding"] = d.archive_decode_rows_per_second
    reading = {} if d.archive_load_rows_per_second is None else {"disk": d.archive_load_rows_per_second}
    d.stage2 = stage(rates, apart=reading)


def add_advice(diagnosis: Diagnosis) -> None:
    """Find the bottleneck and suggest what to change."""
    assert diagnosis.stage2 is not None
    advice, stage2 = diagnosis.advice, diagnosis.stage2
    diagnosis.limit = f"{stage2.limit}, about {stage2.images_per_second:.0f} images/s"
    for name, stage in (("stage 1", diagnosis.stage1), ("stage 2", stage2)):
        if stage is not None and stage.workers > diagnosis.cores:
            advice.append(
                f"{name}: {stage.workers} workers would keep up with the device, and {diagnosis.cores} cores may be "
                "used: more cores, smaller images or several views of each decoded image help"
            )
    if stage2.limit == "loader":
        advice.append("rendering is the bottleneck: train several students in one pass (--seed 0 --seed 1 ...)")
        advice.append("or use several views of each decoded image (--views-per-image 2), or store smaller images")
    unneeded = {HARD_LINKS, EXCLUSIVE_RENAME} if diagnosis.commits_by else set()
    problems = ((name, problem) for name, problem in diagnosis.file_system.items() if name not in unneeded)
    lacking = [f"{name} ({problem})" for name, problem in problems if problem]
    if lacking:
        advice.append(
            f"the file system of this folder lacks {', '.join(lacking)}: write archives elsewhere, and copy them here"
        )
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
