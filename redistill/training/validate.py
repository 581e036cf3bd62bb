"""Held-out images: how good the students are, and how close to their teacher where its answers are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from redistill_cache import open_archive
from redistill_cache.errors import Refused
from torch import Tensor, nn

from redistill.devices import refuse_out_of_memory
from redistill.loading import batch_loader
from redistill.metrics import MetricSums, batch_sums
from redistill.models.model_info import Normalise
from redistill.sources.index import SourceIndex, index_source
from redistill.sources.open_source import open_source
from redistill.training.feed import carry
from redistill.views import ArchiveViews, DrawnViews, ViewDataset, join_archive, parse_recipe
from redistill.views.canaries import check_canaries

__all__ = ["Validation", "labels_by_name"]

# Pixels up to this size stay in memory from the first pass on.
KEPT_BYTES = 1 << 29


class Validation:
    """Labelled images, cut in the middle; or the first view of an archive over them, with what its teacher said."""

    def __init__(
        self,
        dataset: ViewDataset,
        labels: np.ndarray,
        teacher_logits: np.ndarray | None,
        *,
        batch_size: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Use `open`."""
        self.dataset, self.labels, self.teacher_logits = dataset, labels, teacher_logits
        self.rows = np.flatnonzero(labels >= 0)[rank::world]
        self.batch_size, self.workers = batch_size, workers
        self._kept: list[tuple[np.ndarray, Tensor]] = []

    @classmethod
    def open(
        cls,
        data: str | Any,  # noqa: ANN401  or any object that can be made a source
        *,
        class_names: tuple[str, ...] | None,
        num_classes: int,
        size: int,
        archive: Path | None = None,
        teachers: Sequence[str] = (),
        batch_size: int = 256,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Validation:
        """`class_names` and `num_classes` are the student's; another order of the same names is put right."""
        source = open_source(data)
        index = index_source(source, workers=None if workers else 0)
        labels = labels_by_name(index, class_names, num_classes, str(data))
        teacher_logits = None
        if archive is None:
            recipe = parse_recipe(f"center?size={size}")
            dataset = ViewDataset(source, DrawnViews(index, recipe, seed=0, num_views=1))
        else:
            opened = open_archive(archive)
            joined = join_archive(index, opened)
            check_canaries(source, opened, joined).require()
            dataset = ViewDataset(source, ArchiveViews(opened, joined), size=size)
            if (opened.class_names, opened.num_classes) != (class_names, num_classes):
                raise Refused(f"{archive} is of other classes than the students; cache the same teacher over {data}")
            labels = np.asarray(opened.labels)
            said = [opened.logits(0, teacher=name) for name in teachers or opened.teachers]
            teacher_logits = np.mean(said, axis=0)  # as in training: the mean of the teachers' logits
        if not (labels >= 0).any():
            raise Refused(f"{data} has no labels, so nothing can be validated on it")
        return cls(dataset, labels, teacher_logits, batch_size=batch_size, workers=workers, rank=rank, world=world)

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def tallies(
        self, students: Sequence[tuple[nn.Module, Normalise]], device: torch.device, amp: torch.dtype | None = None
    ) -> list[MetricSums]:
        """What each student gets right of this process's share, all from one pass over the images."""
        totals: list[MetricSums | None] = [None] * len(students)
        for rows, pixels in self._batches():
            moved = pixels.to(device)
            labels = torch.from_numpy(self.labels[rows]).to(device)
            said = None if self.teacher_logits is None else torch.from_numpy(self.teacher_logits[rows]).to(device)
            for at, (network, normalise) in enumerate(students):
                network.eval()
                with (
                    refuse_out_of_memory(len(pixels), device),
                    torch.autocast(device.type, amp) if amp is not None else nullcontext(),
                ):
                    logits = network(normalise(moved))
                one = batch_sums(logits, labels, said)
                before = totals[at]
                totals[at] = one if before is None else before + one
        found = [total for total in totals if total is not None]
        if len(found) < len(students):
            raise Refused(f"{len(self.labels)} images for validation cannot be shared by so many processes")
        return found

    def _batches(self) -> Iterator[tuple[np.ndarray, Tensor]]:
        if self._kept:
            yield from self._kept
            return
        pieces = [self.rows[at : at + self.batch_size] for at in range(0, len(self.rows), self.batch_size)]
        keep = len(self.rows) * 3 * self.dataset.size**2 <= KEPT_BYTES
        loader = batch_loader(
            self.dataset,
            ([self.dataset.index(0, row) for row in rows.tolist()] for rows in pieces),
            workers=self.workers,
            collate=carry,
        )
        kept = []
        for rows, carried in zip(pieces, loader, strict=True):
            if keep:
                kept.append((rows, carried.pixels))
            yield rows, carried.pixels
        self._kept = kept


def labels_by_name(index: SourceIndex, class_names: tuple[str, ...] | None, num_classes: int, data: str) -> np.ndarray:
    """The labels of an index as the classes of a student, by name where both sides have names."""
    names, labels = index.class_names, np.asarray(index.labels)
    if names is None or class_names is None or names == class_names:
        if labels.max(initial=-1) >= num_classes:
            raise Refused(f"{data} has the label {labels.max()}, the student knows {num_classes} classes")
        return labels
    place = {name: i for i, name in enumerate(class_names)}
    unknown = [name for name in names if name not in place]
    if unknown or len(place) < len(class_names):
        raise Refused(
            f"{data} has the class {unknown[0]!r}, which the student does not know; validate on the same classes"
            if unknown
            else "class names of the archive repeat, so classes cannot be matched by name"
        )
    mapping = np.array([place[name] for name in names], np.int64)
    return np.where(labels >= 0, mapping[np.maximum(labels, 0)], labels)
