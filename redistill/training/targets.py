"""The teacher's logits for a training batch: from the archive, or from a teacher that runs beside the students."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from redistill_cache import PackedView
from torch import Tensor

from redistill.cached_teacher import decode_rows
from redistill.signals import LOGITS
from redistill.teachers import Teacher
from redistill.training.feed import BatchPlan
from redistill.training.shared_views import SharedViews

__all__ = ["CachedTargets", "OnlineTargets"]


class CachedTargets:
    """targets(plan, pixels) -> float32 [B, C] on the device: the mean of the teachers' logits.

    The mean of logits is the geometric mean of the teachers' distributions, at every temperature at once.
    """

    def __init__(self, shared_views: SharedViews, device: torch.device) -> None:
        self.shared_views, self.device = shared_views, device
        self._resident: list[list[PackedView]] = []
        self._views: tuple[int, ...] = ()

    def begin_epoch(self, views: tuple[int, ...], next_views: tuple[int, ...] | None) -> None:
        """Make the views of an epoch resident, and start to load those of the next."""
        self._resident = []  # their buffers are about to be reused
        self._resident, self._views = self.shared_views.load(views, next_views), views

    def __call__(self, plan: BatchPlan, pixels: Tensor) -> Tensor:
        del pixels
        assert plan.views == self._views, f"views {self._views} are resident, the batch is of views {plan.views}"
        logits = [self._teacher_logits(views, plan) for views in self._resident]
        return logits[0] if len(logits) == 1 else torch.stack(logits).mean(0)

    def _teacher_logits(self, views: Sequence[PackedView], plan: BatchPlan) -> Tensor:
        """Of one teacher, in the order of the batch: the views of an image follow each other."""
        logits = [decode_rows(view, plan.rows, self.device) for view in views]
        return logits[0] if len(logits) == 1 else torch.stack(logits, 1).flatten(0, 1)

    def close(self) -> None:
        self._resident = []
        self.shared_views.close()


class OnlineTargets:
    """The baseline without an archive's logits: a teacher computes them from the pixels of the batch."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def begin_epoch(self, views: tuple[int, ...], next_views: tuple[int, ...] | None) -> None: ...

    def __call__(self, plan: BatchPlan, pixels: Tensor) -> Tensor:
        del plan
        return self.teacher(pixels)[LOGITS]

    def close(self) -> None: ...
