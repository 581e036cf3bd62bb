"""`export_archive(options)`: rows of an archive as files that other training loops read.

npz         view-0000.npz ...: `keys`, `labels`, `digests`, the parameters of the view, `logits` [N, C], and features as
            `features.LAYER`
webdataset  images-000000.tar ...: a sample per image, written by webdataset.ShardWriter: a .json with key, label, row
            and the parameters of every view, `v0.logits.npy` and so on for each view, and the image file if asked for

A sample is named as webdataset names it: the key of the image up to the first dot of its last part.

export.json, written first, says what the folder is an export of; only the same export is continued in it. A file gets
its name when it is whole, so an interrupted export is continued by the same call. Files do not depend on the time or on
interruptions, and memory does not depend on the number of images.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
from redistill_cache import Archive, open_archive
from redistill_cache.download import Notify, say
from redistill_cache.errors import OutOfRange, Refused
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.locks import locked, new_partial, publish_partial
from redistill_cache.spec import LOGITS
from redistill_cache.storage import LOCAL, disk_trouble, is_leftover, read_small
from redistill_cache.strict_json import canonical
from redistill_cache.wording import human_bytes

from redistill.caching.estimate import free_bytes
from redistill.interchange.options import ExportOptions
from redistill.interrupts import StopRequest, stop_on_signals
from redistill.progress import NoProgress, Progress
from redistill.sources.base import Source
from redistill.sources.index import repeats
from redistill.sources.open_source import open_source
from redistill.views import join_archive

__all__ = ["ExportResult", "export_archive", "sample_name"]

DESCRIPTION = "export.json"
MAX_DESCRIPTION = 1 << 20
PIECE_BYTES = 16 << 20  # of rows that are decoded together, as float32
EARLIEST = (1980, 1, 1, 0, 0, 0)  # the first time a zip archive can state
# The first bytes of the image formats, and the extension by which webdataset decodes them.
IMAGE_KINDS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


@dataclass(frozen=True)
class ExportResult:
    path: str
    archive: str
    views: tuple[int, ...]
    samples: int
    files: int
    kept: int
    """Files that an earlier call had finished."""
    total_bytes: int
    """Of all files; of a dry run, of the rows in them."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Job:
    options: ExportOptions
    archive: Archive
    views: tuple[int, ...]
    widths: Mapping[str, int]
    source: Source | None
    """With the images, if they are exported too."""
    source_rows: np.ndarray
    stop: StopRequest
    progress: Progress

    @property
    def count(self) -> int:
        return self.archive.num_samples

    @property
    def row_bytes(self) -> int:
        """Of the signals of one view."""
        return sum(self.widths.values()) * np.dtype(self.options.dtype).itemsize

    def rows(self, signal: str, view: int, rows: np.ndarray) -> np.ndarray:
        """Decoded rows in the type of the export."""
        teacher = self.options.teacher
        decoded = (
            self.archive.logits(view, rows, teacher=teacher)
            if signal == LOGITS
            else self.archive.features(view, rows, layer=signal, teacher=teacher)
        )
        if self.options.dtype == "float32":
            return decoded
        if signal == LOGITS and not self.archive.codec(teacher).keeps_shift:  # near 0, float16 is most exact
            decoded = decoded - decoded.max(1, keepdims=True)
        largest = float(np.abs(decoded).max(initial=0))
        if largest > float(np.finfo(np.float16).max):
            raise Refused(f"view {view} has {signal} of {largest:.4g}, beyond float16; use --dtype float32")
        return decoded.astype(np.float16)

    def pieces(self, start: int, stop: int, views: int) -> Iterator[np.ndarray]:
        """Consecutive rows, few enough to decode `views` views of them at once."""
        step = max(1, PIECE_BYTES // (4 * sum(self.widths.values()) * views))
        for first in range(start, stop, step):
            self.stop.raise_if_set()
            yield np.arange(first, min(first + step, stop))


def export_archive(
    options: ExportOptions, progress: Progress | None = None, *, dry_run: bool = False, notify: Notify = say
) -> ExportResult:
    """Write the files, or those that are missing; with `dry_run`, only check and count."""
    with stop_on_signals() as stop:
        job = make_job(options, stop, progress or NoProgress())
        names = npz_names(job) if options.to == "npz" else tar_names(job)
        rows = job.count * len(job.views) * job.row_bytes
        out = options.out.absolute()
        check_folder(job, out)
        kept = finished(job, out, names)
        if not kept and rows > (free := free_bytes(out)):
            raise Refused(f"{out}: the rows take {human_bytes(rows)}, found {human_bytes(free)} free; free some space")
        total = rows
        if not dry_run:
            with disk_trouble("write", out):
                LOCAL.make_directories(out)
                with locked(out, f"exports to {out}", notify):
                    check_folder(job, out)
                    for path in filter(is_leftover, out.iterdir()):  # of killed calls
                        path.unlink()
                    LOCAL.publish(out / DESCRIPTION, describe(job))
                    (write_npz_files if options.to == "npz" else write_tars)(job, out, names)
            total = sum((out / name).stat().st_size for name in names)
    return ExportResult(
        path=str(options.out),
        archive=job.archive.id or "",
        views=job.views,
        samples=job.count,
        files=len(names),
        kept=kept,
        total_bytes=total,
    )


def make_job(options: ExportOptions, stop: StopRequest, progress: Progress) -> Job:
    archive = open_archive(options.archive)
    held = min(archive.views_of(options.teacher, signal) for signal in options.signals)
    views = options.views or tuple(range(held))
    if max(views) >= held:
        raise OutOfRange(f"{archive.path} has views 0 to {held - 1} of these signals, --views has {max(views)}")
    widths = {signal: archive.part_of(options.teacher, signal)[1].width for signal in options.signals}
    source, source_rows = None, np.zeros(0, np.int64)
    if options.images is not None:
        source = open_source(options.images)
        source_rows = join_archive(source, archive).source_row_of_archive_row
    return Job(options, archive, views, widths, source, source_rows, stop, progress)


def describe(job: Job) -> bytes:
    """What decides the bytes of the files; a path or an address does not."""
    options = job.options
    settings = {
        "format": "redistill-export",
        "version": 1,
        "archive": job.archive.id,
        "to": options.to,
        "teacher": job.archive.teacher(options.teacher).name,
        "views": list(job.views),
        "signals": list(options.signals),
        "dtype": options.dtype,
    }
    if options.to == "webdataset":
        settings |= {"images": job.source is not None, "per_tar": options.per_tar}
    return canonical(settings)


def check_folder(job: Job, out: Path) -> None:
    """Refuse a folder that holds anything but this export."""
    if not out.exists():
        return
    with disk_trouble("read", out):
        if (out / DESCRIPTION).exists():
            if read_small(out / DESCRIPTION, MAX_DESCRIPTION) != describe(job):
                raise Refused(f"{out} holds another export (its {DESCRIPTION} differs); choose another folder")
        elif any(not is_leftover(path) for path in out.iterdir()):
            raise Refused(f"{out} holds other files; choose a new folder")


def finished(job: Job, out: Path, names: list[str]) -> int:
    """How many files need not be written: of tars, which are written one after another, the leading ones."""
    written = [(out / name).exists() for name in names]
    return written.index(False) if job.options.to == "webdataset" and not all(written) else sum(written)


# -- npz --------------------------------------------------------------------------------------------------------------


def npz_names(job: Job) -> list[str]:
    return [f"view-{view:04d}.npz" for view in job.views]


def write_npz_files(job: Job, out: Path, names: list[str]) -> None:
    for done, (view, name) in enumerate(zip(job.views, names, strict=True), start=1):
        if not (out / name).exists():
            with new_partial(out / name) as file:
                write_npz(job, view, file)
            publish_partial(file, out / name)
        job.progress.advance("export", done * job.count, len(names) * job.count)


def write_npz(job: Job, view: int, file: IO[bytes]) -> None:
    """Every array in pieces, not compressed, since rows of floats hardly get smaller."""
    archive = job.archive
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as npz:
        with member(npz, "keys", f"<U{max(map(len, archive.keys))}", (job.count,)) as (write, dtype):
            for start in range(0, job.count, 4096):
                write(np.array(list(archive.keys[start : start + 4096]), dtype))
        arrays = {"labels": archive.labels, "digests": archive.digests} | archive.view_params(view)
        for name, array in arrays.items():
            with member(npz, name, array.dtype.str, array.shape) as (write, _):
                write(array)
        for signal, width in job.widths.items():
            with member(npz, shown(signal), np.dtype(job.options.dtype).str, (job.count, width)) as (write, _):
                for rows in job.pieces(0, job.count, 1):
                    write(job.rows(signal, view, rows))


@contextmanager
def member(
    npz: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]
) -> Iterator[tuple[Callable[[np.ndarray], int], str]]:
    """An array of an npz file: a function that writes its next rows, and their type."""
    info = zipfile.ZipInfo(f"{name}.npy", EARLIEST)
    info.external_attr = 0o644 << 16
    with npz.open(info, "w", force_zip64=True) as file:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda rows: file.write(np.ascontiguousarray(rows, dtype).tobytes()), dtype


def shown(signal: str) -> str:
    """The name of a signal in files: layers have names of their own, such as `labels`."""
    return signal if signal == LOGITS else f"features.{signal}"


# -- webdataset -------------------------------------------------------------------------------------------------------


def tar_names(job: Job) -> list[str]:
    return [f"images-{number:06d}.tar" for number in range(-(-job.count // job.options.per_tar))]


def write_tars(job: Job, out: Path, names: list[str]) -> None:
    """The tars after the leading ones that are there already."""
    import webdataset

    samples = sample_names(job.archive.keys)
    first = finished(job, out, names)
    if first == len(names):
        return
    shards = Shards()
    with webdataset.ShardWriter(
        f"{str(out).replace('%', '%%')}/images-%06d.tar",
        maxcount=job.options.per_tar,
        maxsize=math.inf,
        start_shard=first,
        opener=shards.open,
        post=shards.publish,
        verbose=0,
        encoder=False,
        mtime=0,
        format="PAX_FORMAT",  # for names of any length
    ) as writer:
        try:
            for rows in job.pieces(first * job.options.per_tar, job.count, len(job.views)):
                for sample in samples_of(job, rows, samples):
                    writer.write(sample)
                job.progress.advance("export", int(rows[-1]) + 1, job.count)
        except BaseException:
            shards.failed = True
            raise


class Shards:
    """The tar that is written, which gets its name when it is whole. ShardWriter calls `publish` after an error too."""

    def __init__(self) -> None:
        self.failed = False

    def open(self, path: str) -> IO[bytes]:
        self._file = new_partial(Path(path))
        return self._file

    def publish(self, path: str) -> None:
        self._file.close()
        if self.failed:
            Path(self._file.name).unlink()
        else:
            publish_partial(self._file, Path(path))


def samples_of(job: Job, rows: np.ndarray, samples: PackedKeys) -> Iterator[dict[str, Any]]:
    archive = job.archive
    params = {view: archive.view_params(view, rows) for view in job.views}
    values = {(view, signal): job.rows(signal, view, rows) for view in job.views for signal in job.widths}
    for position, row in enumerate(rows.tolist()):
        views = [
            {"view": view, **{name: array[position].tolist() for name, array in params[view].items()}}
            for view in job.views
        ]
        label = int(archive.labels[row])
        described = {"key": archive.keys[row], "row": row, "views": views}
        sample: dict[str, Any] = {
            "__key__": samples[row],
            "json": canonical(described | ({"label": label} if label >= 0 else {})),
        }
        for (view, signal), array in values.items():
            sample[f"v{view}.{shown(signal)}.npy"] = npy_bytes(array[position])
        if job.source is not None:
            kind, content = image_of(job, job.source, row)
            sample[kind] = content
        yield sample


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def image_of(job: Job, source: Source, row: int) -> tuple[str, bytes]:
    """Extension and bytes of the image file of a row."""
    sample = source.sample(int(job.source_rows[row]))
    if not isinstance(sample.payload, bytes):
        raise Refused(f"the images of {source.spec} are arrays and not files; export without --images")
    if sha256(sample.payload).digest() != job.archive.digests[row].tobytes():
        raise Refused(f"image {sample.key!r} has changed since it was indexed; restore it")
    kind = next((kind for start, kind in IMAGE_KINDS.items() if sample.payload.startswith(start)), None)
    if kind is None:
        raise Refused(f"image {sample.key!r} is in none of the formats {', '.join(IMAGE_KINDS.values())}")
    return kind, sample.payload


def sample_names(keys: PackedKeys) -> PackedKeys:
    """How webdataset names the images: the key up to the first dot of its last part. Whoever unpacks a tar trusts its
    names, and an archive may come from anyone, so no name leads out of the folder."""
    names = pack_keys(map(sample_name, keys))
    if len(again := repeats(names.hashes())):
        raise Refused(
            f"{len(again):,} images have the name of another one up to the first dot, such as "
            f"{names[int(again[0])]!r}; webdataset cannot tell them apart: use --to npz"
        )
    return names


def sample_name(key: str) -> str:
    folder, slash, last = key.rpartition("/")
    name = folder + slash + last.partition(".")[0]
    if not all(part not in ("", ".", "..") for part in name.split("/")) or not name.isprintable() or "\\" in name:
        raise Refused(f"the key {key[:200]!r} cannot be the name of a file in a tar; use --to npz")
    return name
