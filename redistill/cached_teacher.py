"""A teacher whose logits come from an archive, for any training loop."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from redistill_cache import Archive, PackedView, ViewLoader
from redistill_cache.codecs.protocol import indices_of
from redistill_cache.errors import OutOfRange, UsageError
from torch import Tensor

from redistill.signals import LOGITS

__all__ = ["SHARE_OF_GPU", "CachedTeacher", "DeviceView", "Placed", "decode_rows", "placed", "room_for_rows"]

Numbers = Tensor | np.ndarray | Sequence[int]
# The largest share of a GPU's free memory that teacher rows may take, and the bytes that are copied there at once.
SHARE_OF_GPU, PIECE = 0.25, 1 << 26
# torch selects rows of these types as those of the same size.
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class CachedTeacher:
    """teacher(rows, views) -> float32 logits [n, classes] on `device`, as the teacher computed them for these views.

        teacher = redistill.CachedTeacher(archive, device="cuda")
        for view in range(archive.num_views):
            for pixels, labels, rows, views in DataLoader(dataset, 256, sampler=dataset.indices(view)):
                loss = power_divergence(student(pixels.cuda()), teacher(rows, views))

    `rows` are row numbers of the archive, as `ViewDataset` returns them; `views` is one view, or the view of each row.
    The packed rows of the current view are in memory, those of the next view are loaded in the background, and rows
    are decoded on the device. If batches mix views, all views that occur stay in memory, up to `memory_gib`; above it,
    views are loaded again and again, which is slow. On a GPU, views are copied there, up to `memory_gib` and a quarter
    of the free memory; rows of others are copied with every batch.
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
        # By signal, and by view where batches mix views: the view, and itself or its copy on a GPU.
        self._placed: dict[tuple[str, int | None], tuple[PackedView, Placed]] = {}

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
            return self._decode(signal, used[0], row_of, alone=True)
        parts = [np.flatnonzero(view_of == view) for view in used]
        logits = [self._decode(signal, view, row_of[part], alone=False) for view, part in zip(used, parts, strict=True)]
        order = np.argsort(np.concatenate(parts), kind="stable")
        return torch.cat(logits)[on_device(order, self.device)]

    def _decode(self, signal: str, view: int, rows: np.ndarray, *, alone: bool) -> Tensor:
        alone = alone and (signal, view) not in self._mixed
        packed = self._current(signal, view) if alone else self._kept(signal, view)
        key = (signal, None if alone else view)
        if key not in self._placed or self._placed[key][0] is not packed:
            self._placed.pop(key, None)  # makes room
            taken = sum(place.nbytes for _, place in self._placed.values() if isinstance(place, DeviceView))
            [[place]] = placed([[packed]], self.device, self._room - taken)
            self._placed[key] = packed, place
        return decode_rows(self._placed[key][1], rows, self.device)

    @cached_property
    def _room(self) -> int:
        return room_for_rows(self.device, self.memory_gib)

    def _current(self, signal: str, view: int) -> PackedView:
        """A view that follows the one before."""
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
            self._placed.pop(self._mixed.popitem(last=False)[0], None)
        return kept


def as_numbers(numbers: int | Numbers) -> np.ndarray:
    array = np.asarray(numbers.cpu() if isinstance(numbers, Tensor) else numbers)
    if array.size and array.dtype.kind not in "iu":
        raise UsageError(f"rows and views are integers, found {array.dtype}")
    return array.astype(np.int64)


def decode_rows(view: Placed, rows: np.ndarray, device: torch.device) -> Tensor:
    """float32 [n, width] on `device`. Packed rows are what is copied to a GPU; they are decoded there."""
    if isinstance(view, DeviceView):
        return view.decode(rows)
    if device.type != "cuda":  # numpy has less overhead than torch, and multiplies as fast; MPS has no float64
        return torch.from_numpy(view.decode(rows)).to(device)
    decoded: Tensor = view.codec.decode({name: on_device(array, device) for name, array in view.gather(rows).items()})
    return decoded


# -- views on a GPU ---------------------------------------------------------------------------------------------------


class DeviceView:
    """A packed view that was copied to a GPU, where its rows are gathered and decoded.

    For a batch, only the numbers of its rows are copied. Which of them need sparse arrays is looked up on the host, so
    that it need not wait for the GPU to find them.
    """

    def __init__(self, view: PackedView, device: torch.device) -> None:
        self.codec, self.device, self.nbytes = view.codec, device, view.nbytes
        self._arrays = {name: copied(array, device) for name, array in view.arrays.items()}
        self._sparse = {name: (at.copy(), copied(values, device)) for name, (at, values) in view.sparse.items()}
        self.decode(np.zeros(1, np.int64))  # copies the constants of the codec, for which the host waits

    def decode(self, rows: np.ndarray) -> Tensor:
        """float32 [n, width] of these rows."""
        index = on_device(rows, self.device)
        gathered = {name: select(array, index) for name, array in self._arrays.items()}
        for name, (positions, values) in self._sparse.items():
            needed = positions.take(rows)
            of_batch = np.flatnonzero(needed >= 0)
            if len(of_batch):
                gathered[name] = select(values, on_device(needed[of_batch], self.device))
                gathered[indices_of(name)] = on_device(of_batch, self.device)
        decoded: Tensor = self.codec.decode(gathered)
        return decoded


Placed = PackedView | DeviceView


def placed(views: Sequence[Sequence[PackedView]], device: torch.device, room: int) -> list[list[Placed]]:
    """The views of every signal, on a GPU if all of them fit into `room` bytes there; for `decode_rows`."""
    on_host: list[list[Placed]] = [[*of_signal] for of_signal in views]
    if sum(view.nbytes for of_signal in views for view in of_signal) > room:
        return on_host
    try:
        return [[DeviceView(view, device) for view in of_signal] for of_signal in views]
    except torch.OutOfMemoryError:  # `room` was measured earlier
        return on_host


def room_for_rows(device: torch.device, memory_gib: float) -> int:
    """Bytes for teacher rows on a GPU; none on other devices. Ask once: torch keeps memory that a step has freed."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(min(memory_gib * 2**30, SHARE_OF_GPU * free))


def copied(array: np.ndarray, device: torch.device) -> Tensor:
    """In pieces, since the array may be larger than the memory of the host, and then is in a file."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    copy = torch.empty(array.shape, dtype=dtype, device=device)
    step = max(1, PIECE * len(array) // max(array.nbytes, 1))
    for start in range(0, len(array), step):
        copy[start : start + step].copy_(pinned(array[start : start + step].copy()), non_blocking=True)
    return copy


def select(array: Tensor, rows: Tensor) -> Tensor:
    """array[rows]"""
    return array.view(SIGNED.get(array.dtype, array.dtype)).index_select(0, rows).view(array.dtype)


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy for which the host does not wait, if it is one to a GPU."""
    return (pinned(array) if device.type == "cuda" else torch.from_numpy(array)).to(device, non_blocking=True)


def pinned(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).pin_memory()
