"""Files of `torch.save`, read without running them.

No name in such a file resolves to a class or function of another library: the few that arrays and tensors need resolve
to functions of this module, which note what the file states, and any other name is refused with the name. Names are
looked up, never imported. The operations of a pickle are listed before it is read: those that build objects of classes
are refused, as are those that can ask for more memory than the file has bytes. What is returned consists of lists,
tuples, dictionaries, numbers, texts and bytes, of tensors as numpy arrays, and of arrays that `array_of` turns into
numpy's.

Both forms of torch.save are read, the zip archive and the one before torch 1.6.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from redistill_cache.errors import Refused
from redistill_cache.storage import disk_trouble, read_small
from redistill_cache.wording import one_line

__all__ = ["array_of", "load_record", "load_torch"]

Record = TypeVar("Record")

MAX_FILE_BYTES = 256 << 20
MAX_ENTRIES = 10_000  # of a zip archive: one for each tensor
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
ZIP_MAGIC = b"PK\3\4"
# The operations that make objects of classes, or that take memory by a number in the file.
REFUSED_OPERATIONS = frozenset(
    {
        *("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"),
        *("BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"),
    }
)
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
# What unpickling raises on bytes that are not a pickle.
UNPICKLING_RAISES = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_torch(path: Path) -> Any:  # noqa: ANN401  whatever the file holds
    """The object in a file of torch.save."""
    try:
        data = read_small(path, MAX_FILE_BYTES)
        return _from_zip(data) if data.startswith(ZIP_MAGIC) else _legacy(data)
    except Refused as error:
        raise Refused(f"{str(path)!r} is refused: {error}") from None
    except UNPICKLING_RAISES as error:
        raise Refused(
            f"{str(path)!r} is not a file of torch.save, is truncated or damaged: {one_line(error)}; get it again"
        ) from None


def load_record(path: Path, parse: Callable[[Any], Record]) -> Record:
    """What `parse` makes of the object in a file of torch.save. What it refuses is refused with the path."""
    with disk_trouble("read", path):
        content = load_torch(path)
    try:
        return parse(content)
    except Refused as error:
        raise Refused(f"{path}: {error}") from None


def array_of(value: object, what: str) -> np.ndarray:
    """An array or tensor of the file, or a list of numbers, as an array of numbers."""
    if isinstance(value, _Array):
        return value.to_numpy()
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return np.array(value)
    raise Refused(f"expected {what} as an array, found {type(value).__name__.lstrip('_').lower()}")


# -- the two forms of a file ------------------------------------------------------------------------------------------


def _from_zip(data: bytes) -> object:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_ENTRIES or sum(max(e.file_size, e.compress_size) for e in entries) > len(data):
            raise Refused(f"its {len(entries)} entries would take more than its {len(data)} bytes, or are too many")
        pickles = [entry.filename for entry in entries if entry.filename.count("/") == 1 and _is_pickle(entry.filename)]
        if len(pickles) != 1:
            raise Refused(f"expected one entry NAME/data.pkl, found {len(pickles)}")
        root = pickles[0].partition("/")[0]
        names = {entry.filename for entry in entries}
        if (order := f"{root}/byteorder") in names and archive.read(order) != b"little":
            raise Refused("its tensors are not little-endian")

        def storage(key: str) -> bytes:
            if f"{root}/data/{key}" not in names:
                raise Refused(f"the tensor {key[:40]!r} is missing")
            return archive.read(f"{root}/data/{key}")

        return _load(_one_pickle(io.BytesIO(archive.read(pickles[0]))), storage)


def _is_pickle(name: str) -> bool:
    return name.endswith("/data.pkl")


def _legacy(data: bytes) -> object:
    """Five pickles (mark, version, system, object, keys), then the bytes of the tensors in the order of the keys."""
    file = io.BytesIO(data)
    pieces = [_one_pickle(file) for _ in range(5)]
    none: Mapping[str, bytes] = {}
    if _load(pieces[0], none.__getitem__) != LEGACY_MAGIC:
        raise Refused("it does not begin with torch's mark")
    system = _load(pieces[2], none.__getitem__)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("its tensors are not little-endian")
    keys = _load(pieces[4], none.__getitem__)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refused("its list of tensors is damaged")
    # The length of a tensor in bytes follows from the object, so its kind is noted in a first reading.
    sizes: dict[str, int] = {}
    _load(pieces[3], lambda _: b"", sizes)
    storages: dict[str, bytes] = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        size = sizes.get(key, 0)
        storages[key] = file.read(size * count) if 0 <= size * count <= len(data) else b""
        if size and len(storages[key]) != size * count:
            raise Refused(f"the tensor {key[:40]!r} is cut short")
    return _load(pieces[3], storages.__getitem__)


# -- one pickle -------------------------------------------------------------------------------------------------------


def _one_pickle(file: io.BytesIO) -> bytes:
    """The bytes of the pickle at this position, without operations that must not be run."""
    start = file.tell()
    for number, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name in REFUSED_OPERATIONS:
            raise Refused(f"its pickle has the operation {operation.name}, which arrays and tensors do not need")
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > number + 1:
            raise Refused("its pickle numbers its objects with gaps, which takes more memory than they need")
    return file.getbuffer()[start : file.tell()].tobytes()


def _load(data: bytes, storage: Callable[[str], bytes], sizes: dict[str, int] | None = None) -> object:
    """The object of a checked pickle; `storage` gives the bytes of a tensor. With `sizes`, only notes the size in
    bytes of the numbers of each tensor."""
    return _Unpickler(data, storage, sizes).load()


class _Function:
    """A name in a pickle: can be called by it, and not be changed by it."""

    __slots__ = ("_call", "_name")
    _call: Callable[..., object]
    _name: str

    def __init__(self, name: str, call: Callable[..., object]) -> None:
        object.__setattr__(self, "_call", call)
        object.__setattr__(self, "_name", name)

    def __call__(self, *arguments: object) -> object:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise Refused(f"its pickle changes {self._name}")

    def __setstate__(self, state: object) -> NoReturn:
        raise Refused(f"its pickle changes {self._name}")


class _Dtype:
    """What a pickle says of a numpy.dtype: its kind and size, and the byte order that follows."""

    __slots__ = ("code", "order")

    def __init__(self, code: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and isinstance(state[1], str):
            self.order = state[1]

    def to_numpy(self) -> np.dtype[Any]:
        """Plain numbers only: no objects, texts or fields."""
        code = str(self.code)[:20]
        if code not in {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1"}:
            raise Refused(f"expected arrays of numbers, found one of {'objects' if code[:1] == 'O' else repr(code)}")
        if self.order not in ("<", ">", "|", "="):
            raise Refused(f"an array has the byte order {self.order[:20]!r}")
        return np.dtype(("<" if self.order in "|=" else self.order) + code)


class _Array:
    """What a pickle says of a numpy.ndarray."""

    __slots__ = ("state",)
    state: object

    def __setstate__(self, state: object) -> None:
        self.state = state

    def to_numpy(self) -> np.ndarray:
        match getattr(self, "state", None):
            case (int(), tuple() as shape, _Dtype() as dtype, is_fortran, (bytes() | str()) as content):
                raw = content.encode("latin1") if isinstance(content, str) else content
                kind = dtype.to_numpy()
                if all(isinstance(n, int) and n >= 0 for n in shape) and math.prod(shape) * kind.itemsize == len(raw):
                    array = np.frombuffer(raw, kind).reshape(shape, order="F" if is_fortran else "C")
                    return array.astype(kind.newbyteorder("="), copy=False)
        if isinstance(state := getattr(self, "state", None), tuple) and len(state) > 2 and isinstance(state[2], _Dtype):
            state[2].to_numpy()  # refuses objects by name
        raise Refused("an array does not have the bytes of its shape")


class _Unpickler(pickle.Unpickler):
    """Resolves only the names in `names`; any other is refused before anything is imported."""

    def __init__(self, data: bytes, storage: Callable[[str], bytes], sizes: dict[str, int] | None) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._storage, self._sizes, self._budget = storage, sizes, 2 * len(data) + 1024
        self._storages: dict[str, np.ndarray] = {}
        self._names: dict[tuple[str, str], Callable[..., object]] = {
            ("_codecs", "encode"): self._encode,
            ("__builtin__", "bytes"): _no_bytes,
            ("collections", "OrderedDict"): lambda *_: {},
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("numpy", "dtype"): lambda code, *_: _Dtype(code),
            ("numpy", "ndarray"): _not_called,
        }
        for numpy_core in ("numpy.core", "numpy._core"):
            self._names |= {
                (f"{numpy_core}.multiarray", "_reconstruct"): lambda *_: _Array(),
                (f"{numpy_core}.multiarray", "scalar"): _scalar,
                (f"{numpy_core}.numeric", "_frombuffer"): _from_buffer,
            }
        self._names |= {("torch", name): functools.partial(_not_called, name) for name in STORAGES}

    def find_class(self, module: str, name: str) -> _Function:
        call = self._names.get((module, name))
        if call is None:
            full = f"{module}.{name}"[:100]
            raise Refused(f"it asks for {full!r}; files of logits need only numpy's arrays and torch's tensors")
        return _Function(f"{module}.{name}", call)

    def persistent_load(self, identifier: object) -> np.ndarray:
        """The numbers of a tensor, for ("storage", its kind, its key, the device, how many)."""
        match identifier:
            case ("storage", _Function(_name=kind), str() as key, str(), int() as count, *_):
                dtype = STORAGES.get(kind.removeprefix("torch."))
                if dtype is not None:
                    return self._numbers(key, dtype, count)
        raise Refused("a tensor is described in an unknown way")

    def _numbers(self, key: str, dtype: str, count: int) -> np.ndarray:
        is_brain = dtype == "bfloat16"
        kind = np.dtype("<u2" if is_brain else dtype)
        if self._sizes is not None:
            if self._sizes.setdefault(key, kind.itemsize) != kind.itemsize:
                raise Refused(f"the tensor {key[:40]!r} has two types")
            return np.zeros(0, np.float32)
        if key not in self._storages:
            raw = self._storage(key)
            if len(raw) != count * kind.itemsize:
                raise Refused(f"the tensor {key[:40]!r} has {len(raw)} bytes, expected {count} of {kind.itemsize} each")
            numbers = np.frombuffer(raw, kind)
            self._storages[key] = (numbers.astype(np.uint32) << 16).view(np.float32) if is_brain else numbers
        return self._storages[key]

    def _tensor(self, numbers: object, offset: object, size: object, stride: object, *_: object) -> np.ndarray:
        if self._sizes is not None:
            return np.zeros(0, np.float32)
        match numbers, offset, size, stride:
            case np.ndarray(), int() as start, tuple() as shape, tuple() as steps:
                whole = (*shape, *steps, start)
                if len(shape) == len(steps) <= 8 and all(isinstance(n, int) and 0 <= n < 1 << 62 for n in whole):
                    last = start + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
                    is_empty = math.prod(shape) == 0
                    if is_empty or (math.prod(shape) <= len(numbers) and last < len(numbers)):
                        bytes_ = [step * numbers.itemsize for step in steps]
                        flat = numbers[:0] if is_empty else numbers[start:]
                        return np.lib.stride_tricks.as_strided(flat, shape, bytes_, writeable=False)
        raise Refused("a tensor reaches beyond its numbers")

    def _encode(self, text: object, encoding: object = "") -> bytes:
        """How Python 3 writes bytes for Python 2. Their total is bounded: a pickle may repeat one text any number of
        times."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise Refused("its pickle encodes text in another way than bytes are written")
        self._budget -= len(text)
        if self._budget < 0:
            raise Refused("its pickle repeats its content, which takes more memory than the file")
        return text.encode("latin1")


def _not_called(*_: object) -> NoReturn:
    raise Refused("its pickle makes an object in another way than numpy and torch do")


def _no_bytes(*arguments: object) -> bytes:
    """How Python 3 writes b"" for Python 2."""
    if arguments:
        raise Refused("its pickle makes bytes in another way than by their content")
    return b""


def _scalar(dtype: object, content: object) -> int | float | bool:
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
        raise Refused("a number is damaged")
    kind = dtype.to_numpy()
    if len(content) != kind.itemsize:
        raise Refused("a number is damaged")
    number: int | float | bool = np.frombuffer(content, kind)[0].item()
    return number


def _from_buffer(buffer: object, dtype: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", buffer)
    return array
