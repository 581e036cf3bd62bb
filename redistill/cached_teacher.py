"""A teacher whose logits come from an archive, for any training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from redistill_cache import Archive, PackedView, ViewLoader
from redistill_cache.errors import OutOfRange
from torch import Tensor

from redistill.signals import LOGITS

__all__ = ["CachedTeacher", "decode_rows"]


class CachedTeacher:
    """teacher(rows, view) -> float32 logits [n, classes] on `device`, as the teacher computed them for these views.

        teacher = redistill.CachedTeacher(archive, device="cuda")
        for view in range(archive.num_views):
            for pixels, labels, rows, views in DataLoader(dataset, 256, sampler=dataset.indices(view)):
                loss = power_divergence(student(pixels.cuda()), teacher(rows, view))

    The packed rows of the current view are in memory, those of the next view are loaded in the background, and rows
    are decoded on the device. `rows` are row numbers of the archive, as `ViewDataset` returns them.
    """

    # Not the trainer's SharedViews: that is a collective operation, for which all ranks must request the same views at
    # the same step. A user's loop need not do this. What both share is ViewLoader, PackedView and `decode_rows`.

    def __init__(self, archive: Archive, device: str | torch.device = "cpu", *, teacher: str | None = None) -> None:
        self.archive, self.device = archive, torch.device(device)
        self.name = archive.teacher(teacher).name
        self._loaders: dict[str, ViewLoader] = {}

    def __call__(self, rows: Tensor | np.ndarray | Sequence[int], view: int) -> Tensor:
        return self._signal(LOGITS, rows, view)

    def features(self, rows: Tensor | np.ndarray | Sequence[int], view: int, layer: str) -> Tensor:
        """float32 [n, width] of a feature layer in the archive."""
        return self._signal(layer, rows, view)

    def _signal(self, signal: str, rows: Any, view: int) -> Tensor:  # noqa: ANN401  rows in any of three forms
        resident = self._resident(signal, int(view))
        numbers = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows, np.int64)
        if numbers.ndim != 1 or (len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(resident)):
            raise OutOfRange(f"expected a list of rows in [0, {len(resident)}), found {numbers.tolist()!r:.60}")
        if not len(numbers):
            return torch.zeros(0, resident.codec.width, device=self.device)
        return decode_rows(resident, numbers, self.device)

    def _resident(self, signal: str, view: int) -> PackedView:
        views = self.archive.views_of(self.name)
        if not 0 <= view < views:
            raise OutOfRange(f"expected a view in [0, {views}), found {view}")
        loader = self._loaders.get(signal)
        if loader is None:
            self.archive.signal(self.name, signal)
            loader = self._loaders[signal] = self.archive.loader(self.name, signal)
        return loader.take(view, then=(view + 1) % views)


def decode_rows(view: PackedView, rows: np.ndarray, device: torch.device) -> Tensor:
    """float32 [n, width] on `device`. Packed rows are what is copied to a GPU; they are decoded there."""
    if device.type == "cpu":  # numpy has less overhead per operation than torch, and multiplies as fast
        return torch.from_numpy(view.decode(rows))
    packed = {}
    for name, array in view.gather(rows).items():
        tensor = torch.from_numpy(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        packed[name] = tensor.to(device, non_blocking=True)
    decoded: Tensor = view.codec.decode(packed)
    return decoded
