"""Views through the teacher: rendered by worker processes, batch after batch, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from redistill.caching.plan import Plan
from redistill.interrupts import StopRequest
from redistill.loading import batch_loader
from redistill.views.dataset import MixedView, RenderedView

__all__ = ["Forward", "pixels_of"]

Tag = TypeVar("Tag")


def pixels_of(items: list[RenderedView | MixedView]) -> Tensor:
    """uint8 [B, 3, size, size]"""
    return torch.stack([item.pixels for item in items])


class Forward:
    """The teacher and the processes that render for it: started once, for the first look as for the last block.

    Batches are (tag, indices of the dataset); they are read a few ahead, and their tags come back with the results.
    """

    def __init__(self, plan: Plan, stop: StopRequest) -> None:
        self.plan, self.dataset, self.stop = plan, plan.dataset, stop
        self._upcoming = Upcoming()
        pin = plan.teacher.device.type == "cuda"
        self._batches = batch_loader(
            self.dataset, self._upcoming, workers=plan.workers, collate=pixels_of, pin=pin, keep=plan.workers > 0
        )

    def __enter__(self) -> Forward:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._batches.close()

    def indices(self, view: int, rows: Iterable[int]) -> list[int]:
        """Where these rows of a view are in the dataset."""
        return [self.dataset.index(view, row) for row in rows]

    def rendered(self, batches: Iterable[tuple[Tag, Sequence[int]]]) -> Iterator[tuple[Tag, Tensor]]:
        """(tag, pixels) of every batch, until somebody asks to stop."""
        tags: deque[Tag] = deque()

        def upcoming() -> Iterator[Sequence[int]]:
            for tag, indices in batches:
                tags.append(tag)
                yield indices

        self._upcoming.batches = upcoming()
        for pixels in self._batches:
            self.stop.raise_if_set()
            yield tags.popleft(), pixels

    def answers(self, batches: Iterable[tuple[Tag, Sequence[int]]]) -> Iterator[tuple[Tag, Tensor, dict[str, Tensor]]]:
        """(tag, pixels, what the teacher says of them, on its device)."""
        for tag, pixels in self.rendered(batches):
            yield tag, pixels, self.plan.teacher(pixels)


class Upcoming:
    """What a loader that is kept reads next: every iteration of it has batches of its own."""

    def __init__(self) -> None:
        self.batches: Iterator[Sequence[int]] = iter(())

    def __iter__(self) -> Iterator[Sequence[int]]:
        return self.batches
