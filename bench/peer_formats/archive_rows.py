"""The archive, written, opened and read as the two stages do; an epoch gathers from the view in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from redistill_cache import ArchiveSpec, ArchiveWriter, PackedView, SignalSpec, TeacherSpec, layout, open_archive
from redistill_cache.codecs import Codec

from peer_formats.base import BATCH, Batch, Rows, Values, Written, schedule

FOLDER = "rows.redistill.zarr"
DECODED = "decoded"


@dataclass(frozen=True)
class ArchiveRows:
    """`known_only`: encoding is slow, so only the known rows are encoded, and sampled from."""

    name: str
    stores: str
    codec: Codec
    known_only: bool
    note: str = "encoded, hashed, synced; checked when read; a random batch decodes the chunks it needs"
    needs: str = ""

    def write(self, folder: Path, rows: Rows) -> Written:
        spec = ArchiveSpec(
            num_samples=rows.images,
            num_views=rows.views,
            num_classes=rows.logits.shape[2],
            block_rows=1 << max(rows.images - 1, 15).bit_length(),
        )
        writer = ArchiveWriter.create(folder / FOLDER, spec)
        digests = np.random.default_rng(0).integers(0, 256, (rows.images, 32), np.uint8)
        keys = [f"train/{image:08d}" for image in range(rows.images)]
        writer.write_samples(keys, np.zeros(rows.images, np.int64), digests, np.full((rows.images, 2), 64, np.uint32))
        signal = SignalSpec.of("logits", self.codec)
        teacher = writer.add_teacher(TeacherSpec("net", (signal,)), {"logits": self.codec.side()})
        known, owed = self._encode_known(rows)
        for block in writer.missing("teachers/net"):
            wanted = slice(block.start, block.stop)
            if known:
                arrays: Values = {name: drawn(values, rows.pick[block.view, wanted]) for name, values in known.items()}
            else:
                arrays = self._encode(rows.logits[block.view, wanted])
            writer.write(block, {f"logits/{name}": values for name, values in arrays.items()})
        writer.seal()
        side = layout.side_arrays(teacher).values()
        fixed = sum((folder / FOLDER / array.shard_path(0, 0)).stat().st_size for array in side)
        return Written(owed, fixed)

    def _encode(self, logits: np.ndarray) -> Values:
        return {name: np.asarray(array) for name, array in self.codec.encode(logits).arrays.items()}

    def _encode_known(self, rows: Rows) -> tuple[Values, float]:
        """The known rows, and the seconds that encoding each of their repetitions would have taken as well."""
        if not self.known_only:
            return {}, 0.0
        start = time.perf_counter()
        parts = [self._encode(rows.known[at : at + BATCH]) for at in range(0, len(rows.known), BATCH)]
        seconds = time.perf_counter() - start
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return arrays, seconds * (rows.pick.size / len(rows.known) - 1)

    def open(self, folder: Path) -> ArchiveReader:
        return ArchiveReader(folder / FOLDER)

    def dense(self, values: Values, classes: int) -> np.ndarray:  # noqa: ARG002
        return values[DECODED] if DECODED in values else np.asarray(self.codec.decode(values))


class ArchiveReader:
    def __init__(self, path: Path) -> None:
        self._archive = open_archive(path)
        self._view: PackedView | None = None

    def epochs(self, shuffle: np.random.Generator | None) -> Iterator[Batch]:
        loaded = -1
        for view, images in schedule(self._archive.num_views, self._archive.num_samples, shuffle):
            if view != loaded:
                self._view, loaded = self._archive.load_view(view, into=self._view), view
            assert self._view is not None
            yield view, images, self._view.gather(images)

    def batch(self, view: int, images: np.ndarray) -> Values:
        return {DECODED: self._archive.logits(view, images)}

    def close(self) -> None:
        self._view = None


def drawn(values: np.ndarray, pick: np.ndarray) -> np.ndarray:
    """Rows of an array; where none of them is needed, still without taking memory."""
    return values[pick] if values.any() else np.broadcast_to(np.zeros((), values.dtype), (len(pick), *values.shape[1:]))
