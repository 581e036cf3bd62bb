"""A teacher whose logits come from an archive, for any training loop."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from redistill_cache import Archive, PackedView, ViewLoader
from redistill_cache.errors import OutOfRange, UsageError
from torch import Tensor

from redistill.signals import LOGITS

__all__ = ["CachedTeacher", "decode_rows"]

Numbers = Tensor | np.ndarray | Sequence[int]


class CachedTeacher:
    """teacher(rows, views) -> float32 logits [n, classes] on `device`, as the teacher computed them for these views.

        teacher = redistill.CachedTeacher(archive, device="cuda")
        for view in range(archive.num_views):
            for pixels, labels, rows, views in DataLoader(dataset, 256, sampler=dataset.indices(view)):
                loss = power_divergence(student(pixels.cuda()), teacher(rows, views))

    `rows` are row numbers of the archive, as `ViewDataset` returns them; `views` is one view, or the view of each row.
    The packed rows of the current view are in memory, those of the next view are loaded in the background, and rows
    are decoded on the device. If batches mix views, all views that occur stay in memory, up to `memory_gib`; above it,
    views are loaded again and again, which is slow.
    """

    # Not the trainer's SharedViews: that is a collective operation, for which all ranks must request the same views at
    # the same step. A user's loop need not do this. What both share is ViewLoader, PackedView and `decode_rows`.

    def __init__(
        self,
        archive: Archive,
        device: str | torch.device = "cpu",
        *,
        teacher: str | None = None,
        memory_gib: float = 4.0,
    ) -> None:
        self.archive, self.device, self.memory_gib = archive, torch.device(device), memory_gib
        self.name = archive.teacher(teacher).name
        self._loaders: dict[str, ViewLoader] = {}
        self._mixed: OrderedDict[tuple[str, int], PackedView] = OrderedDict()  # the last used at the end

    def __repr__(self) -> str:
        return f"<CachedTeacher {self.name} of {self.archive!r} on {self.device}>"

    def __call__(self, rows: Numbers, views: int | Numbers) -> Tensor:
        return self._signal(LOGITS, rows, views)

    def features(self, rows: Numbers, views: int | Numbers, layer: str) -> Tensor:
        """float32 [n, width] of a feature layer in the archive."""
        return self._signal(layer, rows, views)

    def _signal(self, signal: str, rows: Numbers, views: int | Numbers) -> Tensor:
        row_of, view_of = as_numbers(rows), as_numbers(views)
        if row_of.ndim != 1 or view_of.shape not in ((), row_of.shape):
            shapes = f"{list(row_of.shape)} and {list(view_of.shape)}"
            raise UsageError(f"expected a list of rows, and one view or a view of each row, found the shapes {shapes}")
        for what, numbers, count in (
            ("rows", row_of, self.archive.num_samples),
            ("views", view_of, self.archive.views_of(self.name, signal)),
        ):
            if numbers.size and not 0 <= numbers.min() <= numbers.max() < count:
                raise OutOfRange(f"expected {what} in [0, {count}), found {numbers.min()} to {numbers.max()}")
        if not len(row_of):
            return torch.zeros(0, self.archive.signal(self.name, signal)[1].width, device=self.device)
        used = np.unique(view_of).tolist()
        if len(used) == 1:
            return decode_rows(self._current(signal, used[0]), row_of, self.device)
        parts = [np.flatnonzero(view_of == view) for view in used]
        logits = [
            decode_rows(self._kept(signal, view), row_of[part], self.device)
            for view, part in zip(used, parts, strict=True)
        ]
        order = torch.from_numpy(np.argsort(np.concatenate(parts), kind="stable"))
        return torch.cat(logits)[order.to(self.device)]

    def _current(self, signal: str, view: int) -> PackedView:
        """A view that follows the one before, or one that is kept already."""
        if (signal, view) in self._mixed:
            return self._kept(signal, view)
        loader = self._loaders.get(signal)
        if loader is None:
            self.archive.signal(self.name, signal)
            loader = self._loaders[signal] = self.archive.loader(self.name, signal)
        return loader.take(view, then=(view + 1) % self.archive.views_of(self.name, signal))

    def _kept(self, signal: str, view: int) -> PackedView:
        """One of the views that batches mix."""
        kept = self._mixed.get((signal, view))
        if kept is None:
            kept = self._mixed[signal, view] = self.archive.load_view(view, self.name, signal)
        self._mixed.move_to_end((signal, view))
        while len(self._mixed) > 1 and sum(each.nbytes for each in self._mixed.values()) > self.memory_gib * 2**30:
            self._mixed.popitem(last=False)
        return kept


def as_numbers(numbers: int | Numbers) -> np.ndarray:
    array = np.asarray(numbers.cpu() if isinstance(numbers, Tensor) else numbers)
    if array.size and array.dtype.kind not in "iu":
        raise UsageError(f"rows and views are integers, found {array.dtype}")
    return array.astype(np.int64)


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
