"""Weights on disk: read from safetensors and torch files, written as safetensors.

Reading runs no code: torch files are read with weights_only=True. Files that redistill writes have a JSON object under
the header key "redistill" (the model's spec, class count, normalisation), and are plain safetensors otherwise:
`model.load_state_dict(safetensors.torch.load_file(path))` does not need redistill.

The tensors of a torch file are found by one rule: while the object is a mapping with one of the keys WRAPPERS, take
that one; then drop PREFIXES that all names share. Where a file holds several networks, the option key= names one of
them, by its wrapper or its prefix.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import pickle
import stat
import warnings
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from redistill_cache import strict_json
from redistill_cache.errors import Refused
from redistill_cache.storage import LOCAL, Files
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from redistill.specs import first_line, listed

__all__ = [
    "WeightsFile",
    "header_of",
    "load_into",
    "read_weights",
    "refuse_misfit",
    "save_weights",
    "state_digest",
    "tensor_bytes",
]

WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "net"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "student"),
)
PREFIXES = ("module.", "_orig_mod.", "model.")
HEADER_KEY = "redistill"
MAX_HEADER = 1 << 20
# Of what describes the tensors of a file: a hundred bytes each, and no network has a hundred thousand of them.
MAX_DIRECTORY = 4 << 20
MAX_NESTING = 8
# The fixed part, the longest comment, and what 64-bit lengths add.
LONGEST_ZIP_END = 22 + 65535 + 76
ZEROS = b"bytearray"


@dataclass(frozen=True)
class WeightsFile:
    """The contents of a weights file. `metadata` is empty unless redistill wrote the file."""

    path: Path
    state: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def read_weights(path: Path, key: str | None = None) -> WeightsFile:
    """The tensors of a safetensors or torch file, distinguished by the first bytes; of the part `key`, if given."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, and a device read without an end
            raise Refused(f"cannot read weights from {str(path)!r}: it is not a regular file")
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise Refused(f"no weights file at {str(path)!r}") from None
    except OSError as error:
        raise Refused(f"cannot read weights from {str(path)!r}: {error.strerror or error}") from None
    # safetensors: 8 bytes of header length, then the JSON header.
    is_safetensors = start[8:9] == b"{"
    value, header = read_safetensors(path, start) if is_safetensors else (read_torch(path), None)
    state, prefix = unwrap(value, path, key)
    return WeightsFile(path, without_prefixes(part_of(state, prefix, path)), parse_header(header, path))


def read_safetensors(path: Path, start: bytes) -> tuple[dict[str, Tensor], str | None]:
    length = int.from_bytes(start[:8], "little")
    if MAX_DIRECTORY < length < path.stat().st_size:  # a longer one is reported by the library
        raise Refused(f"{str(path)!r}: a header of {length} bytes, more than the limit of {MAX_DIRECTORY}; not read")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise Refused(f"{str(path)!r} is damaged or not a safetensors file: {first_line(error)}") from None


def parse_header(header: str | None, path: Path) -> Mapping[str, Any]:
    if header is None:
        return MappingProxyType({})
    value = strict_json.parse(header.encode(), cap=MAX_HEADER, where=header_of(path))
    if not isinstance(value, dict):
        raise Refused(f"{header_of(path)}: expected a JSON object under the key {HEADER_KEY!r}")
    return MappingProxyType(value)


def header_of(path: Path) -> str:
    """How error messages name the header."""
    return f"the header of {str(path)!r}"


def read_torch(path: Path) -> object:
    refuse_expanding(path)
    try:
        with (
            path.open("rb") as file,
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals([Namespace]),
        ):
            # An open file, since for a path torch looks at the suffix. Its warnings are about pickles that it refuses.
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message starts with advice to turn the protection off; the reason follows this mark.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]
        if "GLOBAL" in reason or "Trying to" in reason:
            raise Refused(
                f"{str(path)!r} holds Python objects besides tensors, and loading those can run code; if you trust it, "
                f"save its state_dict alone (torch.save(model.state_dict(), PATH)) and use that file instead"
            ) from None
        raise Refused(
            f"{str(path)!r} is neither a safetensors nor a torch file: {reason.strip().splitlines()[0]}"
        ) from None
    except Exception as error:  # noqa: BLE001  unpickling reports damage by any class, TypeError among them
        raise Refused(f"{str(path)!r} is neither a safetensors nor a torch file: {first_line(error)}") from None


def refuse_expanding(path: Path) -> None:
    """Refuse a torch file that would take much more memory than the bytes it has, before it is unpickled.

    torch.save never compresses the entries of its zip archive and writes each once. A pickle may also ask for any
    number of zeros, as `bytearray`, which is the only allowed name that does not need as many bytes in the file.
    """
    try:
        if zipfile.is_zipfile(path):
            expands = directory_bytes(path) > MAX_DIRECTORY or zip_expands(path)
        else:  # a pickle, as torch wrote them before 1.6
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                expands = data.find(ZEROS) >= 0
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, zlib.error) as error:
        raise Refused(f"{str(path)!r} is neither a safetensors nor a torch file: {first_line(error)}") from None
    if expands:
        raise Refused(
            f"{str(path)!r} would take more memory than its size, as no file of torch.save does, or describes its "
            f"tensors in more than {MAX_DIRECTORY} bytes; not read. If you trust it, save its state_dict again"
        )


def directory_bytes(path: Path) -> int:
    """The length of a zip archive's directory, from the record at its end; `zipfile` reads all of it at once."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, LONGEST_ZIP_END), os.SEEK_END)
        end = file.read()
    at = end.rfind(b"PK\5\6")
    # A record with 64-bit lengths, if any, precedes this one and a locator of 20 bytes.
    is_long = end[max(at - 76, 0) :].startswith(b"PK\6\6")
    return int.from_bytes(end[at - 36 : at - 28] if is_long else end[at + 12 : at + 16], "little")


def zip_expands(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            return True
        if sum(entry.file_size for entry in pickles) > MAX_DIRECTORY:
            return True
        return any(ZEROS in archive.read(entry) for entry in pickles)


def unwrap(value: object, path: Path, key: str | None) -> tuple[dict[str, Tensor], str | None]:
    """The mapping of names to tensors inside the wrappers of training scripts; and `key` unless it was a wrapper."""
    for _ in range(MAX_NESTING):  # a pickled mapping may contain itself
        if not isinstance(value, Mapping):
            break
        parts = [name for name in WRAPPERS if holds_tensors(value.get(name))]
        if isinstance(value.get(key), Mapping):
            value, key = value[key], None
        elif len(parts) > 1 and key is None:
            raise Refused(f"{str(path)!r} holds several networks: {', '.join(parts)}; choose one with key=NAME")
        elif len(parts) == 1:
            value = value[parts[0]]
        else:
            break
    if not isinstance(value, Mapping) or not value:
        raise Refused(f"{str(path)!r}: expected a mapping of names to tensors, found {type(value).__name__}")
    others = [str(name) for name, item in value.items() if not isinstance(item, Tensor)]
    if others:
        raise Refused(
            f"{str(path)!r}: expected tensors only, or a wrapper {'/'.join(WRAPPERS)}; found also {listed(others)}; "
            "choose a part with key=NAME"
        )
    unusable = [str(name) for name, item in value.items() if not is_plain(item)]
    if unusable:
        raise Refused(
            f"{str(path)!r}: expected dense tensors of real numbers, found sparse, nested, quantized, complex or meta "
            f"tensors: {listed(unusable)}"
        )
    return {str(name): item for name, item in value.items()}, key


def holds_tensors(value: object) -> bool:
    """Whether a wrapper holds a state, directly or in another wrapper, and not settings."""
    return isinstance(value, Mapping) and any(
        isinstance(item, Tensor) or (name in WRAPPERS and isinstance(item, Mapping)) for name, item in value.items()
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether its elements are real numbers in memory, in rows and columns."""
    is_dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    return is_dense and not tensor.is_complex() and tensor.device.type == "cpu"


def part_of(state: dict[str, Tensor], key: str | None, path: Path) -> dict[str, Tensor]:
    """The tensors whose names start with `key` and a dot, without that prefix."""
    if key is None:
        return state
    part = {name.removeprefix(f"{key}."): item for name, item in state.items() if name.startswith(f"{key}.")}
    if not part:
        found = dict.fromkeys(name.partition(".")[0] for name in state)
        raise Refused(f"{str(path)!r} has no part {key!r}; its names begin with {listed(found)}")
    return part


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the prefixes that wrappers (DataParallel, torch.compile, Lightning) add to every name."""
    names = dict(state)
    for _ in range(len(PREFIXES)):  # they nest: a compiled model inside DistributedDataParallel
        for prefix in PREFIXES:
            if names and all(name.startswith(prefix) for name in names):
                names = {name.removeprefix(prefix): value for name, value in names.items()}
    return names


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, source: str, target: str) -> None:
    """Load exactly these weights into `module`; refuse missing, extra and misshapen tensors by name."""
    refuse_misfit(module.state_dict(), state, source=source, target=target)
    module.load_state_dict(dict(state), strict=False)


def refuse_misfit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], *, source: str, target: str) -> None:
    """Compare names and shapes only, so that `expected` may be on the meta device and nothing is allocated."""
    # Files written before torch 0.4.1 lack the batch counters, which evaluation does not read.
    missing = [k for k in expected if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in expected]
    groups = [f"{len(keys)} {kind} ({listed(keys)})" for keys, kind in ((missing, "missing"), (extra, "extra")) if keys]
    if groups:
        inner = [
            p for p in dict.fromkeys(name.partition(".")[0] for name in extra) if missing and holds(state, p, missing)
        ]
        hint = f"; choose one of its parts with key={' or key='.join(inner)}" if inner else ""
        raise Refused(f"{source} does not hold the weights of {target}: {' and '.join(groups)}{hint}")
    shapes = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if shapes:
        raise Refused(f"{source} does not match {target}: {listed(shapes, '; ')}")


def holds(state: Mapping[str, Tensor], part: str, names: Collection[str]) -> bool:
    return all(f"{part}.{name}" in state for name in names)


def save_weights(module: nn.Module, path: Path, metadata: Mapping[str, Any], *, files: Files = LOCAL) -> None:
    """Write the module's state, durably and atomically; an existing file is replaced.

    `metadata` is stored in the header as JSON; with that of `OpenedModel.metadata()` the file opens without options.
    """
    header = strict_json.canonical(dict(metadata)).decode()
    if len(header) > MAX_HEADER:  # the names of a hundred thousand classes
        header = strict_json.canonical({k: v for k, v in metadata.items() if k != "class_names"}).decode()
    # Copies, since safetensors refuses tensors that share memory; a reader with tied weights loads both names.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in without_prefixes(module.state_dict()).items()}
    files.publish(path, in_order(safetensors.torch.save(state, metadata={"format": "pt", HEADER_KEY: header})))


def in_order(data: bytes) -> bytes:
    """A safetensors file with sorted header keys, since the library writes metadata in random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"))
    padded = header.encode().ljust(-(-len(header.encode()) // 8) * 8)
    return len(padded).to_bytes(8, "little") + padded + data[8 + length :]


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names: the same for every file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, for any memory format and device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
