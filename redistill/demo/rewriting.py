"""An archive again with other logits: a coarser codec, or a teacher that errs. For studies; views and samples stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from redistill_cache import Archive, ArchiveWriter, SignalSpec, TeacherSpec
from redistill_cache.codecs import BlockStats, Codec, fit_codec, join_encoded

from redistill.signals import LOGITS

__all__ = ["mislead", "rewrite_logits"]

PILOT_ROWS = 4096
PIECE_ROWS = 1024

Change = Callable[[np.ndarray, int, np.ndarray], np.ndarray]
"""(logits [n, C], view, rows) -> logits [n, C]"""


def rewrite_logits(
    archive: Archive,
    out: Path,
    *,
    codec: str = "linear",
    fidelity: float = 1e-3,
    k: int = 10,
    teacher: str | None = None,
    change: Change | None = None,
    changed_how: str = "",
) -> str:
    """Write `out` with the logits of one teacher of `archive`, after `change`, in another codec; the id of `out`."""
    stored = archive.teacher(teacher)

    def logits(view: int, rows: np.ndarray) -> np.ndarray:
        exact = archive.logits(view, rows, teacher=stored.name)
        return exact if change is None else change(exact, view, rows)

    writer = ArchiveWriter.create(out, replace(archive.spec, num_views=archive.num_views))
    writer.write_samples(archive.keys, archive.labels, archive.digests, archive.sizes)
    fitted = fit_codec(codec, pilot(archive, logits), fidelity=fidelity, k=k)
    model = {**stored.model, "derived_from": archive.id, "changed_how": changed_how}
    writer.add_teacher(TeacherSpec(stored.name, (SignalSpec.of(LOGITS, fitted),), model), {LOGITS: fitted.side()})
    for block in writer.missing("views"):
        writer.write(block, archive.view_params(block.view, block.rows))
    for block in writer.missing("canaries"):
        rows, pixels = archive.canaries(block.view)
        writer.write(block, {"row": rows, "pixels": pixels})
    for block in writer.missing(f"teachers/{stored.name}"):
        writer.write(block, *encoded(fitted, logits(block.view, np.arange(block.start, block.stop))))
    return writer.seal()


def pilot(archive: Archive, logits: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """Rows evenly spread over all views."""
    everything = archive.num_samples * archive.num_views
    count = min(everything, PILOT_ROWS)
    views, rows = np.divmod(np.arange(count) * everything // count, archive.num_samples)
    return np.concatenate([logits(int(view), rows[views == view]) for view in np.unique(views)])


def encoded(codec: Codec, rows: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """What a writer takes of a block: its arrays and its statistics."""
    whole = join_encoded([codec.encode(rows[at : at + PIECE_ROWS]) for at in range(0, len(rows), PIECE_ROWS)])
    arrays = {f"{LOGITS}/{name}": np.asarray(array) for name, array in whole.arrays.items()}
    return arrays, {LOGITS: BlockStats.of(whole).to_json()}


def mislead(share: float, seed: int = 0) -> Change:
    """A teacher that is confidently wrong about `share` of what it is asked, each view of an image by itself.

    In such a row the largest logit changes places with that of a random other class.
    """

    def change(logits: np.ndarray, view: int, rows: np.ndarray) -> np.ndarray:
        classes = logits.shape[1]
        draws = np.stack([np.random.default_rng((seed, view, int(row))).random(2) for row in rows])
        wrong = np.flatnonzero(draws[:, 0] < share)
        top = logits[wrong].argmax(1)
        other = (top + 1 + (draws[wrong, 1] * (classes - 1)).astype(np.int64)) % classes
        misled = logits.copy()
        misled[wrong, top], misled[wrong, other] = logits[wrong, other], logits[wrong, top]
        return misled

    return change
