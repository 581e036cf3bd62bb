"""Read the first block back before the long run goes on: the same pixels, and what the teacher said of them."""

from __future__ import annotations

import numpy as np
from redistill_cache import Archive, ArchiveWriter
from redistill_cache.codecs import kl_rows
from redistill_cache.codecs.certify import relative_error
from redistill_cache.errors import Refused
from redistill_cache.layout import Block
from torch import Tensor

from redistill.caching.forward import pixels_of
from redistill.caching.plan import Plan
from redistill.signals import LOGITS
from redistill.views import ArchiveViews, ViewDataset, join_archive

__all__ = ["SelfTest"]

# A GPU may pick other kernels the second time; what it says then differs by rounding, not by this much.
REPEATED = {"cpu": 1e-6, "cuda": 1e-3, "mps": 1e-3}


class SelfTest:
    """Keeps the first batch it is shown. Once its block is committed, it is rendered again from the archive alone, and
    held against what workers made of it, and what is stored against what the teacher says."""

    def __init__(self, plan: Plan, writer: ArchiveWriter) -> None:
        self._plan, self._writer = plan, writer
        self._first: tuple[int, range, Tensor] | None = None
        self._passed = False

    @property
    def due(self) -> bool:
        return self._first is not None and not self._passed

    def keep(self, block: Block, rows: range, pixels: Tensor) -> None:
        if self._first is None:
            self._first = block.view, rows, pixels.clone()

    def run(self) -> None:
        assert self._first is not None
        view, rows, rendered = self._first
        archive = self._writer.read_back()
        pixels = replayed(self._plan, archive, view, rows)
        differing = int((pixels != rendered).flatten(1).any(1).sum())
        if differing:
            raise Refused(
                f"self-test: {differing} of {len(rows)} views come out differently from the archive than they were "
                "drawn; do the images change while they are read?"
            )
        name = self._plan.teacher_name
        for signal, said in self._plan.teacher(pixels).items():
            stored = archive.features(view, np.asarray(rows), layer=signal, teacher=name)
            lost = largest_error(signal, said.cpu().numpy(), stored)
            bound = archive.codec(name, signal).config().get("fidelity", 0.0) + REPEATED[self._plan.teacher.device.type]
            if lost > bound:
                raise Refused(
                    f"self-test: stored {signal} are {lost:.3g} away from what the teacher says now, {bound:.3g} is "
                    "the bound; does the teacher give the same answer twice?"
                )
        self._passed = True


def replayed(plan: Plan, archive: Archive, view: int, rows: range) -> Tensor:
    """These views as a student will see them."""
    dataset = ViewDataset(plan.source, ArchiveViews(archive, join_archive(plan.index, archive)))
    return pixels_of(dataset.__getitems__([dataset.index(view, row) for row in rows]))


def largest_error(signal: str, exact: np.ndarray, stored: np.ndarray) -> float:
    """In the measure that the fidelity of the signal bounds."""
    if signal != LOGITS:
        return float(np.max(relative_error(exact, stored)))
    return max(float(kl_rows(exact, stored, temperature).max()) for temperature in (1.0, 4.0))
