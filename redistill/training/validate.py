"""Metrics of students on held-out images, and their agreement with a teacher if an archive of these images exists."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from redistill_cache import Archive
from redistill_cache.errors import Refused
from torch import Tensor, nn

from redistill.devices import refuse_out_of_memory
from redistill.loading import BatchLoader
from redistill.metrics import MetricSums, batch_sums
from redistill.models.model_info import Normalise
from redistill.sources import OnBadImage
from redistill.sources.base import NO_LABEL, in_any_order
from redistill.sources.index import SourceIndex, index_source
from redistill.sources.open_source import open_source
from redistill.training.feed import collate_views
from redistill.views import DrawnViews, Recipe, ViewDataset, parse_recipe
from redistill.views.aligned import aligned_views

__all__ = ["Validation", "validation_recipe"]

# Pixels up to this size stay in memory after the first pass.
CACHED_BYTES = 1 << 29


class Validation:
    """Labelled images with a center crop; or view 0 of an archive of them, with the logits of its teacher."""

    def __init__(
        self,
        dataset: ViewDataset,
        labels: np.ndarray,
        teacher_logits: np.ndarray | None,
        class_names: tuple[str, ...] | None,
        *,
        batch_size: int,
        workers: int,
        rank: int,
        world_size: int,
    ) -> None:
        """Use `open`."""
        self.dataset, self.labels, self.teacher_logits, self.class_names = dataset, labels, teacher_logits, class_names
        self.rows = np.flatnonzero(labels >= 0)[rank::world_size]
        self.batch_size, self.workers = batch_size, workers
        self._cached: list[tuple[np.ndarray, Tensor]] = []
        self._loader: BatchLoader | None = None

    @classmethod
    def open(
        cls,
        data: str | Any,  # noqa: ANN401  or any object that can be made a source
        *,
        class_names: tuple[str, ...] | None,
        num_classes: int,
        size: int,
        archive: Archive | None = None,
        teachers: Sequence[str] = (),
        on_bad_image: OnBadImage = "fail",
        batch_size: int = 256,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Validation:
        """`class_names` (None: those of the data) and `num_classes` are the student's; classes are matched by name."""
        indexing = None if workers else 0
        teacher_logits = None
        if archive is None:
            source = open_source(data)
            index = index_source(source, workers=indexing, on_bad_image=on_bad_image)
            labels = labels_by_name(index, class_names, num_classes, str(data))
            class_names = index.class_names if class_names is None else class_names
            dataset = ViewDataset(source, DrawnViews(index, validation_recipe(size), seed=0, num_views=1))
        else:
            if (archive.class_names, archive.num_classes) != (class_names, num_classes):
                raise Refused(
                    f"the classes of {archive.path} are not those of the student; run the same teacher over {data}"
                )
            views = aligned_views(data, archive, size=size, workers=indexing)
            views.alignment.require()
            dataset, labels = views.dataset, np.asarray(archive.labels)
            logits = [archive.logits(0, teacher=name) for name in teachers or archive.teachers]
            teacher_logits = np.mean(logits, axis=0)  # as in training: the mean of the teachers' logits
        if not (labels >= 0).any():
            raise Refused(f"{data} has no labels; validation needs them")
        options = {"batch_size": batch_size, "workers": workers, "rank": rank, "world_size": world_size}
        return cls(dataset, labels, teacher_logits, class_names, **options)

    @classmethod
    def of_rows(
        cls,
        dataset: ViewDataset,
        rows: np.ndarray,
        *,
        class_names: tuple[str, ...] | None,
        size: int,
        without: Collection[str] = (),
        batch_size: int = 256,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Validation:
        """The center crops of these rows of an archive's dataset, with the labels of the archive."""
        index = index_source(dataset.source, workers=None if workers else 0, without=without)
        source_rows = dataset.views.source_rows[rows]
        present = source_rows >= 0
        labels = np.full(len(index), NO_LABEL)
        labels[np.searchsorted(index.rows, source_rows[present])] = dataset.views.labels[rows[present]]
        if not (labels >= 0).any():
            raise Refused(f"{dataset.source.spec} has none of the {len(rows)} images that are held out for validation")
        center = DrawnViews(index, parse_recipe(f"center?size={size}"), seed=0, num_views=1)
        crops = ViewDataset(in_any_order(dataset.source), center)
        options = {"batch_size": batch_size, "workers": workers, "rank": rank, "world_size": world_size}
        return cls(crops, labels, None, class_names, **options)

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def metric_sums(
        self, students: Sequence[tuple[nn.Module, Normalise]], device: torch.device, amp: torch.dtype | None = None
    ) -> list[MetricSums]:
        """The sums of each student over this rank's images, from one pass over them."""
        totals: list[MetricSums | None] = [None] * len(students)
        for rows, pixels in self._batches(device):
            moved = pixels.to(device, non_blocking=True)
            labels = torch.from_numpy(self.labels[rows]).to(device)
            teacher = None if self.teacher_logits is None else torch.from_numpy(self.teacher_logits[rows]).to(device)
            for i, (network, normalise) in enumerate(students):
                network.eval()
                with (
                    refuse_out_of_memory(len(pixels), device),
                    torch.autocast(device.type, amp) if amp is not None else nullcontext(),
                ):
                    logits = network(normalise(moved))
                batch, total = batch_sums(logits, labels, teacher), totals[i]
                totals[i] = batch if total is None else total + batch
        complete = [total for total in totals if total is not None]
        if len(complete) < len(students):
            raise Refused(f"{len(self.labels)} validation images are too few for this number of ranks")
        return complete

    def _batches(self, device: torch.device) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(rows, uint8 pixels) of this rank. The first pass starts the workers, which stay for the following ones."""
        if self._cached:
            yield from self._cached
            return
        batches = [self.rows[start : start + self.batch_size] for start in range(0, len(self.rows), self.batch_size)]
        cache = len(self.rows) * 3 * self.dataset.size**2 <= CACHED_BYTES
        indices = ((rows, [self.dataset.index(0, row) for row in rows.tolist()]) for rows in batches)
        cached = []
        if self._loader is None:
            pin = device.type == "cuda" and not cache
            self._loader = BatchLoader(self.dataset, workers=self.workers, collate=collate_views, pin=pin)
        for rows, images in self._loader.load(indices):
            if cache:
                cached.append((rows, images.pixels))
            yield rows, images.pixels
        self._cached = cached
        if cache:
            self.close()

    def close(self) -> None:
        """Stop the workers."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None


def validation_recipe(size: int) -> Recipe:
    """A centre crop: the views on which students are validated without an archive of the validation images."""
    return parse_recipe(f"center?size={size}")


def labels_by_name(index: SourceIndex, class_names: tuple[str, ...] | None, num_classes: int, data: str) -> np.ndarray:
    """The labels of an index as classes of the student, matched by name if both sides have names."""
    names, labels = index.class_names, np.asarray(index.labels)
    if names is None or class_names is None or names == class_names:
        if labels.max(initial=-1) >= num_classes:
            raise Refused(f"{data} has the label {labels.max()}, the student has {num_classes} classes")
        return labels
    class_of_name = {name: i for i, name in enumerate(class_names)}
    unknown = [name for name in names if name not in class_of_name]
    if unknown:
        raise Refused(f"{data} has the class {unknown[0]!r}, the student does not; validate on the same classes")
    if len(class_of_name) < len(class_names):
        raise Refused("the archive has duplicate class names, so classes cannot be matched by name")
    mapping = np.array([class_of_name[name] for name in names], np.int64)
    return np.where(labels >= 0, mapping[np.maximum(labels, 0)], labels)
