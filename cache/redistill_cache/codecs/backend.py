"""The few array operations of the codecs, under one name in numpy and in torch.

Written by hand because torch must not be imported here: a tensor can only exist in a process that has imported torch
already, so the module is taken from sys.modules. Everything runs on the device of the rows.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Array", "Backend", "backend_of", "encodable", "to_numpy"]

Array = Any  # a numpy array or a torch tensor; typing both would import torch

# torch keeps pinned memory for the next copy; what is larger is a constant, which is copied once.
PINNED_BYTES = 1 << 20


@dataclass(frozen=True)
class Backend:
    """numpy, or torch on one device."""

    torch: Any = None
    device: Any = None

    @property
    def key(self) -> str:
        return "numpy" if self.torch is None else f"torch:{self.device}"

    @property
    def on_host(self) -> bool:
        return self.torch is None or self.device.type == "cpu"

    def without_autocast(self) -> AbstractContextManager[object]:
        """Products in the types of their operands, also where the caller trains in mixed precision."""
        return nullcontext() if self.torch is None else self.torch.autocast(self.device.type, enabled=False)

    def constant(self, values: np.ndarray, dtype: str | None = None) -> Array:
        """A numpy array, copied to the device. The host does not wait for a GPU, unless the array is large."""
        values = np.ascontiguousarray(values, dtype=dtype)
        if self.torch is None:
            return values
        if not values.flags.writeable:
            values = values.copy()
        tensor = self.torch.from_numpy(values)
        if self.device.type == "cuda" and tensor.nbytes <= PINNED_BYTES:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def read(self, arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
        """Arrays on the host. It waits for a GPU once, for all of them."""
        if self.torch is None:
            return dict(arrays)
        copies = {name: array.detach().to("cpu", non_blocking=True) for name, array in arrays.items()}
        if self.device.type == "cuda":
            self.torch.cuda.current_stream(self.device).synchronize()
        return {name: copy.numpy() for name, copy in copies.items()}

    def view(self, x: Array, dtype: str) -> Array:
        """The same bytes as values of another type of the same size."""
        return x.view(dtype) if self.torch is None else x.view(getattr(self.torch, dtype))

    def cast(self, x: Array, dtype: str) -> Array:
        if self.torch is None:
            return x.astype(dtype, copy=False)
        return x.to(getattr(self.torch, dtype))

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        if self.torch is None:
            return np.zeros(shape, dtype)
        return self.torch.zeros(shape, dtype=getattr(self.torch, dtype), device=self.device)

    def rint(self, x: Array) -> Array:
        """To the nearest integer, ties to even in both libraries."""
        return np.rint(x) if self.torch is None else self.torch.round(x)

    def floor_divide(self, x: Array, divisor: Array) -> Array:
        """Integer division, rounding down."""
        return x // divisor if self.torch is None else self.torch.div(x, divisor, rounding_mode="floor")

    def floor(self, x: Array) -> Array:
        return np.floor(x) if self.torch is None else self.torch.floor(x)

    def exp(self, x: Array) -> Array:
        return np.exp(x) if self.torch is None else self.torch.exp(x)

    def log(self, x: Array) -> Array:
        return np.log(x) if self.torch is None else self.torch.log(x)

    def log1p(self, x: Array) -> Array:
        return np.log1p(x) if self.torch is None else self.torch.log1p(x)

    def log2(self, x: Array) -> Array:
        return np.log2(x) if self.torch is None else self.torch.log2(x)

    def abs(self, x: Array) -> Array:
        return np.abs(x) if self.torch is None else self.torch.abs(x)

    def sqrt(self, x: Array) -> Array:
        return np.sqrt(x) if self.torch is None else self.torch.sqrt(x)

    def isfinite(self, x: Array) -> Array:
        return np.isfinite(x) if self.torch is None else self.torch.isfinite(x)

    def isnan(self, x: Array) -> Array:
        return np.isnan(x) if self.torch is None else self.torch.isnan(x)

    def where(self, mask: Array, yes: Array, no: Array) -> Array:
        return np.where(mask, yes, no) if self.torch is None else self.torch.where(mask, yes, no)

    def clip(self, x: Array, low: float | None, high: float | None) -> Array:
        return np.clip(x, low, high) if self.torch is None else self.torch.clamp(x, low, high)

    def minimum(self, x: Array, y: Array) -> Array:
        """The smaller of an array and an array or a number."""
        return np.minimum(x, y) if self.torch is None else self.torch.clamp(x, max=y)

    def maximum(self, x: Array, y: Array) -> Array:
        return np.maximum(x, y) if self.torch is None else self.torch.clamp(x, min=y)

    def larger(self, x: Array, y: Array) -> Array:
        """The larger of two arrays; NaN where either is."""
        return np.maximum(x, y) if self.torch is None else self.torch.maximum(x, y)

    def arange(self, count: int) -> Array:
        return np.arange(count) if self.torch is None else self.torch.arange(count, device=self.device)

    def max_of_row(self, x: Array) -> Array:
        """[n, k] -> [n, 1]."""
        return x.max(axis=1, keepdims=True) if self.torch is None else x.amax(1, keepdim=True)

    def argmax_of_row(self, x: Array) -> Array:
        return x.argmax(axis=1) if self.torch is None else x.argmax(1)

    def largest(self, x: Array, k: int) -> Array:
        """Columns of the k largest values of every row, int64 [n, k]; of equal values, the first columns."""
        if self.torch is not None:
            return self.torch.sort(x, dim=1, descending=True, stable=True)[1][:, :k]
        smallest = np.partition(x, x.shape[1] - k, axis=1)[:, x.shape[1] - k, None]
        above, equal = x > smallest, x == smallest
        room = k - above.sum(1, keepdims=True)
        chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
        return np.nonzero(chosen)[1].reshape(len(x), k)

    def take(self, x: Array, index: Array) -> Array:
        """x[row, index[row, j]]."""
        if self.torch is None:
            return np.take_along_axis(x, index, axis=1)
        return self.torch.gather(x, 1, index.long())

    def put(self, x: Array, index: Array, values: Array) -> Array:
        """x with x[row, index[row, j]] = values[row, j]; changes x in place."""
        if self.torch is None:
            np.put_along_axis(x, index, values, axis=1)
            return x
        return x.scatter_(1, index.long(), values)

    def order(self, x: Array) -> Array:
        """Indices that sort the last axis in ascending order; the sort is stable."""
        return np.argsort(x, kind="stable") if self.torch is None else self.torch.argsort(x, stable=True)

    def lookup(self, table: Array, index: Array) -> Array:
        """table[index], for an index of a small unsigned integer type."""
        if self.torch is None:
            return table.take(index, axis=0)
        index = index if index.dtype == self.torch.int64 else index.to(self.torch.int32)
        return table.index_select(0, index.reshape(-1)).reshape(*index.shape, *table.shape[1:])

    def columns(self, x: Array, index: Array) -> Array:
        """x[:, index], contiguous."""
        return x.take(index, axis=1) if self.torch is None else x.index_select(1, index)

    def affine(self, x: Array, matrix: Array, offset: Array) -> Array:
        """x @ matrix + offset."""
        if self.torch is not None:
            return self.torch.addmm(offset, x, matrix)
        y = x @ matrix
        y += offset
        return y

    def running_sum(self, x: Array) -> Array:
        """Cumulative sum along the rows of an int32 array, as int32."""
        if self.torch is None:
            return np.cumsum(x, axis=1, dtype=np.int32)
        return self.torch.cumsum(x, 1, dtype=self.torch.int32)

    def identity(self, size: int) -> Array:
        return self.constant(np.eye(size))

    def concatenate(self, parts: list[Array], axis: int = 0) -> Array:
        return np.concatenate(parts, axis) if self.torch is None else self.torch.cat(parts, axis)

    def contiguous(self, x: Array) -> Array:
        return np.ascontiguousarray(x) if self.torch is None else x.contiguous()

    def pad_rows(self, x: Array, rows: int) -> Array:
        """x with zero rows appended up to `rows` rows, contiguous."""
        if len(x) == rows:
            return self.contiguous(x)
        padded = self.zeros((rows, *x.shape[1:]), str(x.dtype).removeprefix("torch."))
        padded[: len(x)] = x
        return padded

    def rows_where(self, mask: Array) -> Array:
        """Indices of the true rows."""
        return np.flatnonzero(mask) if self.torch is None else self.torch.nonzero(mask).flatten()

    def nonzero(self, x: Array) -> tuple[Array, Array]:
        """The rows and columns of the values that are not zero."""
        if self.torch is not None:
            rows, columns = self.torch.nonzero(x, as_tuple=True)
            return rows, columns
        return np.divmod(np.flatnonzero(x != 0), x.shape[1])  # numpy is ten times faster with booleans of one axis


def backend_of(x: Array) -> Backend:
    """The backend of an array: its library and device."""
    if isinstance(x, np.ndarray):
        return Backend()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return Backend(torch, x.device)
    raise TypeError(f"expected a numpy array or a torch tensor, found {type(x).__name__}")


def encodable(rows: Array) -> Array:
    """The rows where they can be encoded: on the host, if their device has no float64."""
    return to_numpy(rows) if backend_of(rows).key.startswith("torch:mps") else rows


def to_numpy(x: Array) -> np.ndarray:
    """The values as a numpy array on the host."""
    return x if isinstance(x, np.ndarray) else np.asarray(x.detach().cpu().numpy())
