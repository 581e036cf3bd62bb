"""What the teacher said of the views of a batch: from the archive, or from a teacher that runs beside the students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np
import torch
from redistill_cache import PackedView
from redistill_cache.codecs import Codec
from torch import Tensor

from redistill.signals import LOGITS
from redistill.teachers import Teacher
from redistill.training.feed import TrainBatch
from redistill.training.shared_views import SharedViews

__all__ = ["CachedTargets", "OnlineTargets", "decode_on"]


def decode_on(codec: Codec, packed: Mapping[str, np.ndarray], device: torch.device) -> Tensor:
    """Packed rows to the device, decoded there: float32 [n, width]. The host never holds full rows for a GPU."""
    if device.type == "cpu":  # numpy starts small operations sooner than torch, and multiplies as fast
        return torch.from_numpy(np.asarray(codec.decode(packed)))
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
    """

    def __init__(self, residence: SharedViews, device: torch.device) -> None:
        self.residence, self.device = residence, device
        self._resident: list[list[PackedView]] = []
        self._views: tuple[int, ...] = ()

    def __enter__(self) -> CachedTargets:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resident = []
        self.residence.close(kind, error, trace)

    def begin(self, views: tuple[int, ...], then: tuple[int, ...] | None) -> None:
        """Make the views of an epoch resident, and start on those of the next."""
        self._resident = []  # buffers are about to be used again
        self._resident, self._views = self.residence.take(views, then), views

    def __call__(self, batch: TrainBatch, pixels: Tensor) -> Tensor:
        del pixels
        assert batch.views == self._views, f"views {batch.views} asked for while {self._views} are resident"
        answers = [self._answer(views, batch) for views in self._resident]
        return answers[0] if len(answers) == 1 else torch.stack(answers).mean(0)

    def _answer(self, views: Sequence[PackedView], batch: TrainBatch) -> Tensor:
        """Of one teacher: the views of an image stay together."""
        each = [decode_on(view.codec, view.gather(batch.rows), self.device) for view in views]
        return each[0] if len(each) == 1 else torch.stack(each, 1).flatten(0, 1)


class OnlineTargets:
    """The baseline: the teacher answers for the pixels that the students see."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def __enter__(self) -> OnlineTargets:
        return self

    def __exit__(self, *_: object) -> None: ...

    def begin(self, views: tuple[int, ...], then: tuple[int, ...] | None) -> None: ...

    def __call__(self, batch: TrainBatch, pixels: Tensor) -> Tensor:
        del batch
        return self.teacher(pixels)[LOGITS]
