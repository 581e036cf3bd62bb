"""Copy an archive with other logits, for studies: in another codec, or with wrong predictions. The rest is copied."""

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
    """Copy `archive` to `out` with one teacher, whose logits go through `change` into `codec`. Returns the new id."""
    spec = archive.teacher(teacher)

    def logits(view: int, rows: np.ndarray) -> np.ndarray:
        original = archive.logits(view, rows, teacher=spec.name)
        return original if change is None else change(original, view, rows)

    writer = ArchiveWriter.create(out, replace(archive.spec, num_views=archive.num_views))
    writer.write_samples(archive.keys, archive.labels, archive.digests, archive.sizes)
    fitted = fit_codec(codec, pilot_rows(archive, logits), fidelity=fidelity, k=k)
    model = {**spec.model, "derived_from": archive.id, "changed_how": changed_how}
    writer.add_teacher(TeacherSpec(spec.name, (SignalSpec.of(LOGITS, fitted),), model), {LOGITS: fitted.side()})
    for block in writer.missing("views"):
        writer.write(block, archive.view_params(block.view, block.rows))
    for block in writer.missing("canaries"):
        rows, pixels = archive.canaries(block.view)
        writer.write(block, {"row": rows, "pixels": pixels})
    for block in writer.missing(f"teachers/{spec.name}"):
        writer.write(block, *encode_rows(fitted, logits(block.view, np.arange(block.start, block.stop))))
    return writer.seal()


def pilot_rows(archive: Archive, logits: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """Logits of rows that are evenly spread over all views."""
    total = archive.num_samples * archive.num_views
    count = min(total, PILOT_ROWS)
    views, rows = np.divmod(np.arange(count) * total // count, archive.num_samples)
    return np.concatenate([logits(int(view), rows[views == view]) for view in np.unique(views)])


def encode_rows(codec: Codec, rows: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Arrays and statistics of a block, as `ArchiveWriter.write` takes them."""
    pieces = [codec.encode(rows[start : start + PIECE_ROWS]) for start in range(0, len(rows), PIECE_ROWS)]
    encoded = join_encoded(pieces)
    arrays = {f"{LOGITS}/{name}": np.asarray(array) for name, array in encoded.arrays.items()}
    return arrays, {LOGITS: BlockStats.of(encoded).to_json()}


def mislead(share: float, seed: int = 0) -> Change:
    """Make a teacher confidently wrong on `share` of the views, drawn for each view of an image independently.

    In such a row, the largest logit is swapped with that of a random other class.
    """

    def change(logits: np.ndarray, view: int, rows: np.ndarray) -> np.ndarray:
        num_classes = logits.shape[1]
        draws = np.stack([np.random.default_rng((seed, view, int(row))).random(2) for row in rows])
        wrong = np.flatnonzero(draws[:, 0] < share)
        top = logits[wrong].argmax(1)
        other = (top + 1 + (draws[wrong, 1] * (num_classes - 1)).astype(np.int64)) % num_classes
        misled = logits.copy()
        misled[wrong, top], misled[wrong, other] = logits[wrong, other], logits[wrong, top]
        return misled

    return change
