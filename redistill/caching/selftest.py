"""Read the first block back before the long run goes on: the same pixels, and what the teacher said of them."""

from __future__ import annotations

import numpy as np
import torch
from redistill_cache import ArchiveWriter
from redistill_cache.codecs import kl_rows
from redistill_cache.codecs.certify import relative_error
from redistill_cache.errors import Refused
from redistill_cache.layout import Block

from redistill.caching.forward import pixels_of
from redistill.caching.plan import Plan
from redistill.signals import LOGITS
from redistill.sources.join import join
from redistill.views import ArchiveViews, ViewDataset

__all__ = ["self_test"]

# A GPU may pick other kernels the second time; what it says then differs by rounding, not by this much.
REPEATED = {"cpu": 1e-6, "cuda": 1e-3, "mps": 1e-3}


def self_test(plan: Plan, writer: ArchiveWriter, block: Block) -> None:
    """Replay the first batch of a committed block from the archive alone, and hold it against source and teacher."""
    archive = writer.read_back()
    rows = np.arange(block.start, min(block.start + plan.options.batch_size, block.stop))
    joined = join(
        plan.index,
        keys=archive.keys,
        labels=archive.labels,
        digests=archive.digests,
        class_names=archive.class_names,
    )
    pixels = {}
    for name, dataset in (
        ("drawn", plan.dataset),
        ("replayed", ViewDataset(plan.source, ArchiveViews(archive, joined))),
    ):
        pixels[name] = pixels_of(dataset.__getitems__([dataset.index(block.view, row) for row in rows.tolist()]))
    if not torch.equal(pixels["drawn"], pixels["replayed"]):
        differing = int((pixels["drawn"] != pixels["replayed"]).flatten(1).any(1).sum())
        raise Refused(
            f"self-test: {differing} of {len(rows)} views come out differently from the archive than they were drawn; "
            "do the images change while they are read?"
        )
    said = plan.teacher(pixels["replayed"])
    for signal, exact in said.items():
        codec = archive.codec(plan.teacher_name, signal)
        stored = archive.features(block.view, rows, layer=signal, teacher=plan.teacher_name)
        error = kl_rows if signal == LOGITS else _relative
        lost = max(float(np.max(error(exact.cpu().numpy(), stored, t))) for t in (1.0, 4.0))
        bound = codec.config().get("fidelity", 0.0) + REPEATED[plan.teacher.device.type]
        if lost > bound:
            raise Refused(
                f"self-test: stored {signal} are {lost:.3g} away from what the teacher says now, {bound:.3g} is the "
                "bound; does the teacher give the same answer twice?"
            )


def _relative(exact: np.ndarray, stored: np.ndarray, temperature: float) -> np.ndarray:
    del temperature
    return np.asarray(relative_error(exact, stored))
