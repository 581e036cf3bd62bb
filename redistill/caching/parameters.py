"""What an archive holds of its views beside the teacher's answers: their parameters, and canaries."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from redistill_cache import ArchiveWriter
from redistill_cache.layout import Block

from redistill.caching.forward import Forward
from redistill.caching.plan import Plan
from redistill.views.canaries import canary_rows, fingerprint

__all__ = ["is_committed", "write_canaries", "write_parameters"]


def is_committed(writer: ArchiveWriter, block: Block) -> bool:
    """Whether anybody has committed this block by now."""
    return (writer.path / block.record_path).exists()


def write_parameters(plan: Plan, writer: ArchiveWriter, view: int) -> None:
    """The parameters of every row of a view: a mixed image needs those of a partner, which may be any."""
    missing = [block for block in writer.missing("views") if block.view == view]
    for block in plan.rank.order(missing):
        if not is_committed(writer, block):
            writer.write(block, plan.views.params(view, np.arange(block.start, block.stop)))


def write_canaries(forward: Forward, writer: ArchiveWriter) -> None:
    """Fingerprints of a few views of every kind, before the teacher is asked about the rest."""
    plan = forward.plan

    def batches() -> Iterator[tuple[tuple[Block, np.ndarray], list[int]]]:
        for block in plan.rank.order(writer.missing("canaries")):
            if not is_committed(writer, block):
                rows = canary_rows(plan.spec.seed, block.view, plan.spec.num_samples, plan.spec.canaries_per_view)
                yield (block, rows), forward.indices(block.view, rows.tolist())

    for (block, rows), pixels in forward.rendered(batches()):
        writer.write(block, {"row": rows, "pixels": fingerprint(pixels)})
