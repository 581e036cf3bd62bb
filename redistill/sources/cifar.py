"""`cifar10:PATH` and `cifar100:PATH`: torchvision's files on disk, in PATH or in PATH/cifar-10-batches-py.

* `?split=train` (the default) or `?split=val`; the test images of CIFAR are the split 'val'.
* Samples are uint8 arrays [32, 32, 3]; keys name split, file and place in it: 'train/data_batch_1/00042'. Classes are
  those of batches.meta or meta (for CIFAR-100 the 100 fine ones).
* Nothing is downloaded, unless `?download=1` asks torchvision's downloader to put missing files into PATH.
* The files are pickles. No code in one ever runs: the few names such a file needs are answered by recorders of our
  own, not by numpy, and any other name refuses the file. That holds for the published files as for others. The md5
  sums torchvision publishes only tell whether the files are the originals (`original`, also in the description);
  files of the same layout with other sums, such as a subset, are read under the same rules.
* A pickled source holds no pixels; each process that gets one reads the files when first asked for a sample.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import math
import pickle
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from redistill_cache.errors import Refused, UsageError
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.wording import one_line

from redistill.sources.base import Sample
from redistill.specs import Spec

__all__ = ["CifarBatch", "CifarSource", "open_cifar", "read_batch", "read_class_names"]


# -- cifar files ------------------------------------------------------------------------------------------------------
#
# CIFAR's files, which are pickles, read without running any code in them.
#
# The few names such a file needs are answered by recorders of our own, not by numpy; any other name refuses the file
# before anything is imported.

ROW_BYTES = 3 * 32 * 32
MAX_FILE_BYTES = 1 << 30
# What unpickling raises on bytes that are not a pickle of this layout.
UNPICKLING_RAISES = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class CifarBatch:
    """The images of one file, uint8 [n, 3072], their labels, and the file's md5 sum."""

    pixels: np.ndarray
    labels: np.ndarray
    md5: str


def read_batch(path: Path, label_key: str) -> CifarBatch:
    data = _read(path)
    content = _unpickle(data, path)
    recorded, labels = content.get("data"), content.get(label_key)
    if not isinstance(recorded, _Array) or not isinstance(labels, list):
        raise Refused(f"{str(path)!r} is not a CIFAR file: it needs an array 'data' and a list {label_key!r}")
    pixels = recorded.to_rows(path)
    if len(pixels) != len(labels) or not all(type(label) is int and 0 <= label < 1 << 31 for label in labels):
        raise Refused(f"{str(path)!r} is damaged: {len(labels)} labels for {len(pixels)} images, or not whole numbers")
    return CifarBatch(pixels, np.array(labels, np.int64), hashlib.md5(data, usedforsecurity=False).hexdigest())


def read_class_names(path: Path, key: str) -> tuple[str, ...]:
    names = _unpickle(_read(path), path).get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise Refused(f"{str(path)!r} is not a CIFAR file: it needs a list of class names {key!r}")
    return tuple(names)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise Refused(
            f"{str(path)!r} is not there; expected torchvision's CIFAR files; correct the path, or add '?download=1'"
        )
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise Refused(f"{str(path)!r} has {size} bytes; a CIFAR file has at most {MAX_FILE_BYTES}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def _unpickle(data: bytes, path: Path) -> dict[object, object]:
    try:
        content = _Unpickler(io.BytesIO(data), path).load()
    except UNPICKLING_RAISES as error:
        raise Refused(f"{str(path)!r} is not a CIFAR file, or damaged: {one_line(error)}; get it again") from error
    if not isinstance(content, dict):
        raise Refused(f"{str(path)!r} is not a CIFAR file: expected a dictionary, found a {type(content).__name__}")
    return content


class _Dtype:
    """Stands for numpy.dtype while unpickling: remembers its name."""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and fields; a file that needed them fails the check of its name and length."""


class _Array:
    """Stands for numpy.ndarray while unpickling: remembers what would have been its state."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def to_rows(self, path: Path) -> np.ndarray:
        """The array the state describes, which must be images in rows: uint8 [n, 3072]."""
        match self.state:
            case (
                int(),
                (int() as rows, int() as columns),
                _Dtype(name="u1" | "uint8"),
                order,
                (bytes() | str()) as raw,
            ):
                content = raw.encode("latin1") if isinstance(raw, str) else raw  # a str where Python 2 wrote it
                if columns == ROW_BYTES and rows >= 0 and len(content) == math.prod((rows, columns)):
                    array = np.frombuffer(content, np.uint8).reshape((rows, columns), order="F" if order else "C")
                    return np.ascontiguousarray(array)
        raise Refused(f"{str(path)!r} is not a CIFAR file: its 'data' is not a whole uint8 array [n, {ROW_BYTES}]")


def _reconstruct(*_: object) -> _Array:
    """Stands for numpy's: an empty array, whose state follows."""
    return _Array()


def _from_buffer(buffer: object, dtype: object, shape: object, order: object) -> _Array:
    """Stands for numpy's: how arrays are pickled since protocol 5."""
    array = _Array()
    array.state = (1, shape, dtype, order == "F", bytes(buffer) if isinstance(buffer, bytearray) else buffer)
    return array


def _encode(text: str, encoding: str = "") -> bytes:
    """Stands for codecs.encode: how Python 3 writes bytes for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


ANSWERS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Reads data and nothing else: a name outside ANSWERS refuses the file before anything is imported."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        answer = ANSWERS.get((module, name))
        if answer is None:
            wanted = f"{module}.{name}"[:100]
            raise Refused(f"{str(self.path)!r} is refused: it asks for {wanted!r}, which a CIFAR file never needs")
        return answer


# -- cifar ------------------------------------------------------------------------------------------------------------

SPLITS = ("train", "val")
LABEL_KEYS = {"cifar10": "labels", "cifar100": "fine_labels"}


class CifarSource:
    """The images of one split of CIFAR; the files are read when the source is opened."""

    def __init__(self, root: Path, *, kind: str, split: str = "train", spec: str | None = None) -> None:
        published = _published(kind)
        self.folder = (root if root.name == published.folder else root / published.folder).resolve()
        self.kind, self.split = kind, split
        self.spec = f"{kind}:{root}?split={split}" if spec is None else spec
        files = published.train if split == "train" else published.val
        self.names = tuple(files)
        self.class_names: tuple[str, ...] | None = read_class_names(self.folder / published.meta, published.meta_key)
        self._pixels: np.ndarray | None
        self._pixels, self.labels, self.counts, sums = self._read()
        self.original = sums == tuple(files.values())
        self.description: Mapping[str, Any] = {"kind": kind, "split": split, "original": self.original}
        self.keys: PackedKeys = pack_keys(self._keys())
        if self.labels.min(initial=0) < 0 or self.labels.max(initial=0) >= len(self.class_names):
            raise Refused(f"{str(self.folder)!r} holds labels outside its {len(self.class_names)} classes")

    @property
    def location(self) -> str:
        return f"{self.kind}:{self.folder}:{self.split}"

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return Sample(self.pixels[i].reshape(3, 32, 32).transpose(1, 2, 0), int(self.labels[i]), self.keys[i])

    @property
    def pixels(self) -> np.ndarray:
        """All images as the files hold them, uint8 [N, 3072]: the red plane, the green, the blue."""
        if self._pixels is None:
            pixels, labels, _, _ = self._read()
            if not np.array_equal(labels, self.labels):
                raise Refused(f"the files in {str(self.folder)!r} changed since they were opened; start again")
            self._pixels = pixels
        return self._pixels

    def stamps(self) -> np.ndarray:
        found = [(self.folder / name).stat() for name in self.names]
        rows = np.array([(file.st_size, file.st_mtime_ns) for file in found], np.int64)
        return np.repeat(rows, self.counts, axis=0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}

    def _keys(self) -> Iterator[str]:
        for name, count in zip(self.names, self.counts, strict=True):
            yield from (f"{self.split}/{name}/{i:05d}" for i in range(count))

    def _read(self) -> tuple[np.ndarray, np.ndarray, list[int], tuple[str, ...]]:
        """Pixels and labels of all files, the number of images in each, and their md5 sums."""
        batches = [read_batch(self.folder / name, LABEL_KEYS[self.kind]) for name in self.names]
        pixels = np.concatenate([batch.pixels for batch in batches])
        labels = np.concatenate([batch.labels for batch in batches])
        return pixels, labels, [len(batch.labels) for batch in batches], tuple(batch.md5 for batch in batches)


def open_cifar(spec: Spec) -> CifarSource:
    """A source from `cifar10:PATH?split=train&download=0` or `cifar100:...`."""
    spec.refuse_unknown({"split", "download"})
    if not spec.name:
        raise UsageError(f"{spec.text!r} names no folder; expected '{spec.scheme}:PATH'")
    split = spec.take("split", "train")
    if split not in SPLITS:
        raise UsageError(f"{spec.text!r}: split={split!r} is neither 'train' nor 'val'")
    root = Path(spec.name).expanduser()
    if spec.take("download", False):
        _download(root, _published(spec.scheme))
    return CifarSource(root, kind=spec.scheme, split=split, spec=spec.text)


# -- what torchvision publishes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Published:
    """Names and md5 sums of the files of one of the two sets, from the class attributes of torchvision."""

    folder: str
    train: Mapping[str, str]
    val: Mapping[str, str]
    meta: str
    meta_key: str
    url: str
    archive: str
    archive_md5: str


def _published(kind: str) -> _Published:
    from torchvision import datasets  # here: it takes seconds to load, and only these sets need it

    known = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    return _Published(
        folder=known.base_folder,
        train=dict(known.train_list),
        val=dict(known.test_list),
        meta=known.meta["filename"],
        meta_key=known.meta["key"],
        url=known.url,
        archive=known.filename,
        archive_md5=known.tgz_md5,
    )


def _download(root: Path, published: _Published) -> None:
    """Let torchvision fetch and unpack its archive below `root`, if any file is missing there."""
    from torchvision.datasets.utils import download_and_extract_archive

    root = root.parent if root.name == published.folder else root
    files = (*published.train, *published.val, published.meta)
    if all((root / published.folder / name).is_file() for name in files):
        return
    try:
        download_and_extract_archive(published.url, root, filename=published.archive, md5=published.archive_md5)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        raise Refused(
            f"{published.url} could not be downloaded to {str(root)!r}: {one_line(error)}; "
            f"put {published.folder!r} there by hand, or try again"
        ) from error
