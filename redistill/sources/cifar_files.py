"""CIFAR's files, which are pickles, read without running any code in them.

The few names such a file needs are answered by recorders of our own, not by numpy; any other name refuses the file
before anything is imported.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from redistill_cache.errors import Refused
from redistill_cache.wording import one_line

__all__ = ["Batch", "read_batch", "read_class_names"]

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
class Batch:
    """The images of one file, uint8 [n, 3072], their labels, and the file's md5 sum."""

    pixels: np.ndarray
    labels: np.ndarray
    md5: str


def read_batch(path: Path, label_key: str) -> Batch:
    data = _read(path)
    content = _unpickle(data, path)
    recorded, labels = content.get("data"), content.get(label_key)
    if not isinstance(recorded, _Array) or not isinstance(labels, list):
        raise Refused(f"{str(path)!r} is not a CIFAR file: it needs an array 'data' and a list {label_key!r}")
    pixels = recorded.to_rows(path)
    if len(pixels) != len(labels) or not all(type(label) is int and 0 <= label < 1 << 31 for label in labels):
        raise Refused(f"{str(path)!r} is damaged: {len(labels)} labels for {len(pixels)} images, or not whole numbers")
    return Batch(pixels, np.array(labels, np.int64), hashlib.md5(data, usedforsecurity=False).hexdigest())


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
