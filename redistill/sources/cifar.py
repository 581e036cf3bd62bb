"""`cifar10:PATH` and `cifar100:PATH`: the files of torchvision's CIFAR10 and CIFAR100, in PATH or a folder below it.

* The folder is PATH, or PATH/cifar-10-batches-py (PATH/cifar-100-python).
* `?split=train` (the default) or `?split=val`; CIFAR's test images are the split 'val'.
* Samples are uint8 arrays [32, 32, 3]; keys consist of split, file and position: 'train/data_batch_1/00042'. Class
  names are those of batches.meta or meta (for CIFAR-100 the 100 fine classes).
* Nothing is downloaded, except with `?download=1`, when missing files are fetched from torchvision's address into PATH.
* The files are pickles, and no code in them ever runs: the few names that such a file needs resolve to classes of this
  module instead of numpy's, and a file with any other name is refused. That holds for the published files, too. Their
  md5 sums only decide whether the files are the originals (`original`, also in the description); files of the same
  layout with other sums, such as a subset, are read under the same rules.
* A pickled source holds no pixels; another process reads the files at its first sample.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from redistill_cache.addresses import parse_address
from redistill_cache.errors import Refused, UsageError
from redistill_cache.fetching import fetch_file
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.wording import one_line

from redistill.interrupts import stop_requested
from redistill.sources.base import Sample, file_stamp, local_path
from redistill.specs import Spec

__all__ = ["CifarSource", "open_cifar"]

SPLITS = ("train", "val")
MAX_ARCHIVE_BYTES = 1 << 30
LABEL_KEYS = {"cifar10": "labels", "cifar100": "fine_labels"}


class CifarSource:
    """The images of one split of CIFAR; the files are read when the source is opened."""

    index_file: Path | None = None

    def __init__(self, root: Path, *, kind: str, split: str = "train", spec: str | None = None) -> None:
        published = _published(kind)
        self.folder = (root if root.name == published.folder else root / published.folder).resolve()
        self.kind, self.split = kind, split
        self.spec = f"{kind}:{root}?split={split}" if spec is None else spec
        files = published.train if split == "train" else published.val
        self.names = tuple(files)
        self.class_names: tuple[str, ...] | None = _read_class_names(self.folder / published.meta, published.meta_key)
        self._pixels: np.ndarray | None
        self._pixels, self.labels, self.counts, md5s = self._read()
        self.original = md5s == tuple(files.values())
        self.description: Mapping[str, Any] = {"kind": kind, "split": split, "original": self.original}
        self.keys: PackedKeys = pack_keys(self._keys())
        if self.labels.min(initial=0) < 0 or self.labels.max(initial=0) >= len(self.class_names):
            raise Refused(f"expected labels below {len(self.class_names)} in {str(self.folder)!r}, found others")

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
        """All images as stored in the files, uint8 [N, 3072]: the planes red, green and blue."""
        if self._pixels is None:
            pixels, labels, _, _ = self._read()
            if not np.array_equal(labels, self.labels):
                raise Refused(f"the files in {str(self.folder)!r} changed since they were opened; start the run again")
            self._pixels = pixels
        return self._pixels

    def stamps(self) -> np.ndarray:
        files = [(self.folder / name).stat() for name in self.names]
        stamps = np.array(list(map(file_stamp, files)), np.int64)
        return np.repeat(stamps, self.counts, axis=0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}

    def _keys(self) -> Iterator[str]:
        for name, count in zip(self.names, self.counts, strict=True):
            yield from (f"{self.split}/{name}/{i:05d}" for i in range(count))

    def _read(self) -> tuple[np.ndarray, np.ndarray, list[int], tuple[str, ...]]:
        """Pixels and labels of all files, the number of images in each, and their md5 sums."""
        batches = [_read_batch(self.folder / name, LABEL_KEYS[self.kind]) for name in self.names]
        pixels = np.concatenate([batch.pixels for batch in batches])
        labels = np.concatenate([batch.labels for batch in batches])
        return pixels, labels, [len(batch.labels) for batch in batches], tuple(batch.md5 for batch in batches)


def open_cifar(spec: Spec) -> CifarSource:
    """A source from `cifar10:PATH?split=train&download=0` or `cifar100:...`."""
    spec.refuse_unknown({"split", "download"})
    if not spec.name:
        raise UsageError(f"expected '{spec.scheme}:PATH', found {spec.text!r} without a path")
    split = spec.take("split", "train")
    if split not in SPLITS:
        raise UsageError(f"{spec.text!r}: expected split=train or val, found {split!r}")
    root = local_path(spec.name)
    if spec.take("download", False):
        _download(root, _published(spec.scheme))
    return CifarSource(root, kind=spec.scheme, split=split, spec=spec.text)


# -- what torchvision publishes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Published:
    """Names and md5 sums of the files of one of the two sets, as torchvision publishes them."""

    folder: str
    train: Mapping[str, str]
    val: Mapping[str, str]
    meta: str
    meta_key: str
    url: str
    archive: str
    archive_md5: str


def _published(kind: str) -> _Published:
    from torchvision import datasets  # here: it takes seconds to import, and only these sets need it

    cifar = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    return _Published(
        folder=cifar.base_folder,
        train=dict(cifar.train_list),
        val=dict(cifar.test_list),
        meta=cifar.meta["filename"],
        meta_key=cifar.meta["key"],
        url=cifar.url,
        archive=cifar.filename,
        archive_md5=cifar.tgz_md5,
    )


def _download(root: Path, published: _Published) -> None:
    """Download and unpack torchvision's archive below `root`, unless all files exist."""
    root = root.parent if root.name == published.folder else root
    files = (*published.train, *published.val, published.meta)
    if all((root / published.folder / name).is_file() for name in files):
        return
    packed = root / published.archive

    def check(received: Path) -> None:
        with received.open("rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != published.archive_md5:
                raise Refused(f"{published.url}: the file has another md5 sum than torchvision states")

    try:
        fetch_file(parse_address(published.url), packed, check, most=MAX_ARCHIVE_BYTES, stopped=stop_requested)
        check(packed)  # it may have been there before
        with tarfile.open(packed) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # missing in Python < 3.11.4
            tar.extractall(root)
    except (Refused, OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise Refused(
            f"{published.url} could not be downloaded to {str(root)!r}: {one_line(error)}; "
            f"try again, or put {published.folder!r} there yourself"
        ) from error


# -- reading pickles without running them -----------------------------------------------------------------------------

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
class _Batch:
    """The images of one file, uint8 [n, 3072], their labels, and the file's md5 sum."""

    pixels: np.ndarray
    labels: np.ndarray
    md5: str


def _read_batch(path: Path, label_key: str) -> _Batch:
    data = _read_file(path)
    content = _unpickle(data, path)
    recorded, labels = content.get("data"), content.get(label_key)
    if not isinstance(recorded, _Array) or not isinstance(labels, list):
        raise Refused(f"{str(path)!r} is not a CIFAR file: expected an array 'data' and a list {label_key!r}")
    pixels = recorded.to_rows(path)
    if len(pixels) != len(labels) or not all(type(label) is int and 0 <= label < 1 << 31 for label in labels):
        raise Refused(
            f"{str(path)!r} is damaged: expected {len(pixels)} integers as labels, found {len(labels)} values"
        )
    return _Batch(pixels, np.array(labels, np.int64), hashlib.md5(data, usedforsecurity=False).hexdigest())


def _read_class_names(path: Path, key: str) -> tuple[str, ...]:
    names = _unpickle(_read_file(path), path).get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise Refused(f"{str(path)!r} is not a CIFAR file: expected a list of class names {key!r}")
    return tuple(names)


def _read_file(path: Path) -> bytes:
    if not path.is_file():
        raise Refused(
            f"expected torchvision's CIFAR files, found no {str(path)!r}; correct the path, or add '?download=1'"
        )
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise Refused(f"expected at most {MAX_FILE_BYTES} bytes in {str(path)!r}, found {size}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def _unpickle(data: bytes, path: Path) -> dict[object, object]:
    try:
        content = _Unpickler(io.BytesIO(data), path).load()
    except UNPICKLING_RAISES as error:
        raise Refused(
            f"{str(path)!r} is not a CIFAR file, or is damaged: {one_line(error)}; download it again"
        ) from error
    if not isinstance(content, dict):
        raise Refused(f"{str(path)!r} is not a CIFAR file: expected a dictionary, found a {type(content).__name__}")
    return content


class _Dtype:
    """Replaces numpy.dtype while unpickling: records the name."""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and fields are ignored; a file that needs them fails the check of name and length."""


class _Array:
    """Replaces numpy.ndarray while unpickling: records the state."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def to_rows(self, path: Path) -> np.ndarray:
        """The array that the state describes, which must be uint8 [n, 3072]."""
        match self.state:
            case (
                int(),
                (int() as rows, int() as columns),
                _Dtype(name="u1" | "uint8"),
                order,
                (bytes() | str()) as raw,
            ):
                content = raw.encode("latin1") if isinstance(raw, str) else raw  # a str if written by Python 2
                if columns == ROW_BYTES and rows >= 0 and len(content) == math.prod((rows, columns)):
                    array = np.frombuffer(content, np.uint8).reshape((rows, columns), order="F" if order else "C")
                    return np.ascontiguousarray(array)
        raise Refused(
            f"{str(path)!r} is not a CIFAR file: expected 'data' to be a complete uint8 array [n, {ROW_BYTES}]"
        )


def _reconstruct(*_: object) -> _Array:
    """Replaces numpy's function: an empty array, whose state follows."""
    return _Array()


def _from_buffer(buffer: object, dtype: object, shape: object, order: object) -> _Array:
    """Replaces numpy's function, which pickles use for arrays since protocol 5."""
    array = _Array()
    array.state = (1, shape, dtype, order == "F", bytes(buffer) if isinstance(buffer, bytearray) else buffer)
    return array


def _encode(text: str, encoding: str = "") -> bytes:
    """Replaces codecs.encode, which Python 3 uses to write bytes for Python 2."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


REPLACEMENTS: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    """Resolves only the names in REPLACEMENTS; any other name is refused before anything is imported."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Callable[..., object]:
        replacement = REPLACEMENTS.get((module, name))
        if replacement is None:
            name = f"{module}.{name}"[:100]
            raise Refused(f"{str(self.path)!r} is refused: it refers to {name!r}, which no CIFAR file needs")
        return replacement
