"""What the teacher said of the views of a batch: from the archive, or from a teacher that runs beside the students."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from redistill_cache import Archive, PackedView, ViewLoader
from redistill_cache.codecs import Codec
from torch import Tensor

from redistill.signals import LOGITS
from redistill.teachers import Teacher
from redistill.training.feed import Batch

__all__ = ["CachedTargets", "OnlineTargets", "decode_on"]


def decode_on(codec: Codec, packed: Mapping[str, np.ndarray], device: torch.device) -> Tensor:
    """Packed rows to the device, decoded there: float32 [n, width]. The host never holds full rows for a GPU."""
    moved = {}
    for name, array in packed.items():
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        moved[name] = tensor.to(device, non_blocking=True)
    decoded: Tensor = codec.decode(moved)
    return decoded


class CachedTargets:
    """targets(batch) -> float32 [B, C] on the device: the mean of the teachers' logits.

    The mean of logits is the geometric mean of the teachers' distributions, at every temperature at once.
    The views of an epoch are resident, packed; those of the next are loaded in the background.
    """

    def __init__(
        self, archive: Archive, teachers: Sequence[str], device: torch.device, views_per_image: int, memory: float
    ) -> None:
        self.device = device
        self.codecs = [archive.codec(teacher, LOGITS) for teacher in teachers]
        views = 2 * views_per_image
        needed = sum(row_bytes(codec) for codec in self.codecs) * archive.num_samples * views
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if needed > memory * 2**30:
            self._folder = tempfile.TemporaryDirectory(prefix="redistill-views-")
        self.loaders = [
            [ViewLoader(archive, teacher, LOGITS, buffers=self._buffers) for _ in range(views_per_image)]
            for teacher in teachers
        ]
        self._resident: list[list[PackedView]] = []
        self._views: tuple[int, ...] = ()

    def _buffers(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Memory for packed rows; when there is too little, a file that the system keeps in memory as far as it can."""
        if self._folder is None:
            return np.empty(shape, dtype)
        with tempfile.NamedTemporaryFile(dir=self._folder.name, delete=False) as file:
            return np.memmap(Path(file.name), dtype, "w+", shape=shape)

    @property
    def spilled(self) -> bool:
        return self._folder is not None

    def __enter__(self) -> CachedTargets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for loaders in self.loaders:
            for loader in loaders:
                loader.__exit__(kind, error, trace)
        self._resident = []
        if self._folder is not None:
            self._folder.cleanup()

    def begin(self, views: tuple[int, ...], then: tuple[int, ...] | None) -> None:
        """Make the views of an epoch resident, and start on those of the next."""
        self._resident = [
            [
                loader.take(view, None if then is None else then[j])
                for j, (loader, view) in enumerate(zip(loaders, views, strict=True))
            ]
            for loaders in self.loaders
        ]
        self._views = views

    def __call__(self, batch: Batch, pixels: Tensor) -> Tensor:
        del pixels
        assert batch.views == self._views, f"views {batch.views} asked for while {self._views} are resident"
        total = self._of(0, batch)
        for teacher in range(1, len(self.codecs)):
            total = total + self._of(teacher, batch)
        return total / len(self.codecs) if len(self.codecs) > 1 else total

    def _of(self, teacher: int, batch: Batch) -> Tensor:
        codec, packed = self.codecs[teacher], self._resident[teacher]
        each = [decode_on(codec, view.gather(batch.rows), self.device) for view in packed]
        return each[0] if len(each) == 1 else torch.stack(each, 1).flatten(0, 1)


class OnlineTargets:
    """The baseline: the teacher answers for the pixels that the students see."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def __enter__(self) -> OnlineTargets:
        return self

    def __exit__(self, *_: object) -> None: ...

    def begin(self, views: tuple[int, ...], then: tuple[int, ...] | None) -> None: ...

    def __call__(self, batch: Batch, pixels: Tensor) -> Tensor:
        del batch
        return self.teacher(pixels)[LOGITS]


def row_bytes(codec: Codec) -> int:
    """Of a packed row in memory."""
    return sum(array.row_bytes for array in codec.arrays() if array.name not in codec.rare)
