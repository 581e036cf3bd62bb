"""Weights on disk: safetensors and torch files in, safetensors out.

Nothing here can run code: torch files are read with weights_only=True. Files that redistill writes carry a JSON object
under the header key "redistill" (the model's spec, class count, normalisation), and are plain safetensors otherwise:
`model.load_state_dict(safetensors.torch.load_file(path))` needs nothing of ours.

The tensors of a torch file are looked for by one rule: while the top is a mapping that holds one of WRAPPERS, step
into the first of them; then drop PREFIXES that all names share.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
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

__all__ = ["WeightsFile", "load_into", "read_weights", "refuse_misfit", "save_weights", "state_digest", "tensor_bytes"]

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.")
HEADER_KEY = "redistill"
MAX_HEADER = 1 << 16


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds. `metadata` is empty unless redistill wrote the file."""

    path: Path
    state: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def read_weights(path: Path) -> WeightsFile:
    """The tensors of a safetensors or torch file, told apart by their first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise Refused(f"no file of weights at {str(path)!r}") from None
    except OSError as error:
        raise Refused(f"cannot read weights from {str(path)!r}: {error.strerror or error}") from None
    # safetensors: 8 bytes of header length, then the JSON header.
    return read_safetensors(path) if start[8:9] == b"{" else read_torch(path)


def read_safetensors(path: Path) -> WeightsFile:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise Refused(f"{str(path)!r} is damaged or no safetensors file: {first_line(error)}") from None
    return WeightsFile(path, without_prefixes(state), parse_header(header, path))


def parse_header(header: str | None, path: Path) -> Mapping[str, Any]:
    if header is None:
        return MappingProxyType({})
    found = strict_json.parse(header.encode(), cap=MAX_HEADER, where=f"the header of {str(path)!r}")
    if not isinstance(found, dict):
        raise Refused(f"{str(path)!r}: expected a JSON object under the header key {HEADER_KEY!r}")
    return MappingProxyType(found)


def read_torch(path: Path) -> WeightsFile:
    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            # An open file: given a path, torch would go by its suffix. Its warnings are about pickles it then refuses.
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's message starts with advice to switch the protection off; what happened comes after this mark.
        reason = str(error).rpartition("WeightsUnpickler error: ")[2]
        if "GLOBAL" in reason or "Trying to" in reason:
            raise Refused(
                f"{str(path)!r} holds Python objects besides tensors, and loading those can run code; in a place you "
                f"trust, save its state_dict alone (torch.save(model.state_dict(), PATH)) and give that file"
            ) from None
        raise Refused(
            f"{str(path)!r} is neither a safetensors nor a torch file: {reason.strip().splitlines()[0]}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise Refused(f"{str(path)!r} is neither a safetensors nor a torch file: {first_line(error)}") from None
    return WeightsFile(path, without_prefixes(unwrap(found, path)))


def unwrap(found: object, path: Path) -> dict[str, Tensor]:
    """Step into the wrappers of training scripts until the mapping of tensors is reached."""
    while isinstance(found, Mapping):
        inner = next((found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping) or not found:
        raise Refused(f"{str(path)!r}: expected a mapping of names to tensors, found {type(found).__name__}")
    strays = [str(key) for key, value in found.items() if not isinstance(value, Tensor)]
    if strays:
        raise Refused(
            f"{str(path)!r}: expected tensors only, or a wrapper {'/'.join(WRAPPERS)}; found also {listed(strays)}"
        )
    return {str(key): value for key, value in found.items()}


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what wrappers (DataParallel, torch.compile, Lightning) put before every name."""
    names = dict(state)
    for _ in range(len(PREFIXES)):  # they nest: a compiled model inside DistributedDataParallel
        for prefix in PREFIXES:
            if names and all(name.startswith(prefix) for name in names):
                names = {name.removeprefix(prefix): value for name, value in names.items()}
    return names


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, source: str, target: str) -> None:
    """Give `module` exactly these weights, or refuse in one line that names what does not fit."""
    refuse_misfit(module.state_dict(), state, source=source, target=target)
    module.load_state_dict(dict(state), strict=False)


def refuse_misfit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], *, source: str, target: str) -> None:
    """Names and shapes alone, so that `wanted` may be on the meta device: checked before anything is allocated."""
    # Written before torch 0.4.1, files lack the batch counters, which no evaluation reads.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in wanted]
    groups = [f"{len(keys)} {what} ({listed(keys)})" for keys, what in ((missing, "missing"), (extra, "extra")) if keys]
    if groups:
        raise Refused(f"{source} does not hold the weights of {target}: {' and '.join(groups)}")
    shapes = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if shapes:
        raise Refused(f"{source} does not fit {target}: {listed(shapes, '; ')}")


def save_weights(module: nn.Module, path: Path, metadata: Mapping[str, Any], *, files: Files = LOCAL) -> None:
    """Write the module's state, durably and atomically, over whatever `path` held.

    `metadata` goes into the header as JSON; `OpenedModel.metadata()` makes the file open by itself.
    """
    header = strict_json.canonical(dict(metadata)).decode()
    assert len(header) <= MAX_HEADER, len(header)
    # Copies: safetensors refuses tensors that share memory, and a reader with tied weights loads both names anyway.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in without_prefixes(module.state_dict()).items()}
    files.publish(path, in_order(safetensors.torch.save(state, metadata={"format": "pt", HEADER_KEY: header})))


def in_order(data: bytes) -> bytes:
    """A safetensors file with the keys of its header sorted: the library writes metadata in a random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"))
    padded = header.encode().ljust(-(-len(header.encode()) // 8) * 8)
    return len(padded).to_bytes(8, "little") + padded + data[8 + length :]


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes, in the order of names: equal for equal weights in any file format."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, whatever its memory format or device."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
