"""Views through the teacher: rendered by worker processes, batch after batch, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from redistill.caching.plan import Plan
from redistill.loading import batch_loader
from redistill.views import ViewDataset
from redistill.views.dataset import MixedView, RenderedView

__all__ = ["answers", "pixels_of", "rendered"]

Tag = TypeVar("Tag")


def pixels_of(items: list[RenderedView | MixedView]) -> Tensor:
    """uint8 [B, 3, size, size]"""
    return torch.stack([item.pixels for item in items])


def rendered(
    plan: Plan, dataset: ViewDataset, batches: Iterable[tuple[Tag, Sequence[int]]]
) -> Iterator[tuple[Tag, Tensor]]:
    """(tag, pixels) for every (tag, indices of the dataset); `batches` is read a few ahead."""
    tags: deque[Tag] = deque()

    def indices() -> Iterator[Sequence[int]]:
        for tag, places in batches:
            tags.append(tag)
            yield places

    loader = batch_loader(
        dataset, indices(), workers=plan.workers, collate=pixels_of, pin=plan.teacher.device.type == "cuda"
    )
    for pixels in loader:
        yield tags.popleft(), pixels


def answers(
    plan: Plan, dataset: ViewDataset, batches: Iterable[tuple[Tag, Sequence[int]]]
) -> Iterator[tuple[Tag, dict[str, Tensor]]]:
    """(tag, what the teacher says), on the teacher's device."""
    for tag, pixels in rendered(plan, dataset, batches):
        yield tag, plan.teacher(pixels)
