"""The search for levels on a GPU: what a row tries next is decided there, so that the host waits once for all rows.

Every row takes the steps that `linear_encode` takes on a host, and gets the same bytes. A host tries only the rows that
need another trial. Here their number is not known, so every round tries the first of them, up to a number that is known
beforehand. Rows that are not done after the last round, and those whose errors are too large to be measured without
logarithms, are encoded on the host, which waits for them once more; so it does for rows that are stored exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from redistill_cache.codecs.backend import Array, to_numpy
from redistill_cache.codecs.linear_decode import LEVEL_MASK
from redistill_cache.codecs.linear_encode import Quantizer, levels_of, stored_arrays
from redistill_cache.codecs.protocol import Encoded, absent, exact_rows
from redistill_cache.codecs.stats import NotFinite

__all__ = ["encode_on_device"]

# The share of the rows that a round tries, one part in so many. Of real logits, up to half of the rows fail the first
# trial, a fifth the second, and a third of the rest every other one.
ROUNDS = (2, 4, 8, 16, 16, 32, 32, 32)
FEWEST_ROWS = 32


def encode_on_device(quantizer: Quantizer, rows: Array, on_host: Callable[[np.ndarray], Encoded]) -> Encoded:
    """As `linear_encode.encode_linear`, with all arrays on the host; `on_host` encodes the rows that are not done."""
    if not len(rows):
        return on_host(to_numpy(rows))
    backend, size = quantizer.backend, quantizer.slab_rows
    slabs = [_DeviceSearch(quantizer, rows[start : start + size]).found() for start in range(0, len(rows), size)]
    found = backend.read({name: backend.concatenate([slab[name] for slab in slabs]) for name in slabs[0]})
    if not found["finite"].all():
        raise NotFinite([int(row) for row in np.flatnonzero(~found["finite"])], int(rows.shape[1]))
    exact, kept, undone = found["exact"], found["top1_kept"], np.flatnonzero(~found["done"])
    arrays: dict[str, Array] = {name: found[name] for name in ("q", "level", "escape", "shift") if name in found}
    errors = {name.removeprefix("error "): found[name] for name in found if name.startswith("error ")}
    if len(undone):
        others = on_host(to_numpy(rows[backend.constant(undone, "int64")]))
        exact[undone], kept[undone] = others.exact, others.top1_kept
        for name, values in (*arrays.items(), *errors.items()):
            values[undone] = others.arrays[name] if name in arrays else others.errors[name]
    if not arrays["escape"].any():
        arrays["escape"] = absent(arrays["escape"].shape, "int16")
    return Encoded({**arrays, "exact": exact_rows(rows, exact)}, errors, exact, kept)


class _DeviceSearch:
    """`linear_encode._LevelSearch` of a slab, with masks in the place of lists of rows."""

    def __init__(self, quantizer: Quantizer, rows: Array) -> None:
        backend = self.backend = quantizer.backend
        self.quantizer, self.limit = quantizer, quantizer.settings.limit
        self.finite = backend.isfinite(rows).all(1)
        self.slab = quantizer.prepare(backend.where(self.finite[:, None], rows, 0.0))
        self.everything = backend.arange(len(rows))
        self.level = self.slab.start + 0  # a copy
        self.best = quantizer.first(self.slab)
        projected = quantizer.project_only(self.slab, self.everything).worst(self.limit)
        self.hopeless = ~(projected <= 1.0)
        self.exact = self.slab.too_large
        self.exact = self.exact | (self._failing() & self.hopeless)
        self.undone = self.exact & backend.isnan(projected)
        self._refine()
        self.undone = self.undone | self._failing()  # before a coarser step passes by chance
        if quantizer.settings.certified:
            self._coarsen()
        self._check_decoded()
        self.undone = self.undone | backend.isnan(self._worst())

    def _worst(self) -> Array:
        return self.best.worst(self.limit)

    def _failing(self) -> Array:
        return ~(self._worst() <= 1.0) & ~self.exact

    def _first(self, mask: Array, part: int) -> Array:
        """The first of these rows, and others if they are fewer than one part in so many of all."""
        count = min(max(len(mask) // part, FEWEST_ROWS), len(mask))
        return self.backend.order(self.backend.cast(~mask, "uint8"))[:count]

    def _refine(self) -> None:
        """Take finer steps until rows pass or are stored exactly, if the rounds are enough."""
        backend = self.backend
        for part in ROUNDS:
            failing = self._failing()
            index = self._first(failing, part)
            active, level, ratio = failing[index], self.level[index], self._worst()[index]
            exact = active & (self.hopeless[index] | (level >= LEVEL_MASK) | ~backend.isfinite(ratio))
            self.exact[index] = self.exact[index] | exact
            active = active & ~exact
            finer = backend.minimum(level + levels_of(ratio, up=True), LEVEL_MASK)
            self.level[index] = backend.where(active, finer, level)
            self.best.replace_rows(index, self.quantizer.quantize(self.slab, self.level, index), active)

    def _coarsen(self) -> None:
        """Try the expected coarser step, then the finest other one."""
        backend = self.backend
        expected = self.level - levels_of(1.0 / backend.maximum(self._worst(), 1e-12), up=False)
        before = self.level + 0
        self._try_coarser(backend.maximum(expected, 0))
        skipped = (self.level == before) & (expected == before - 1)
        self._try_coarser(backend.where(skipped, before - 2, self.level - 1))

    def _try_coarser(self, target: Array) -> None:
        """Take these levels where they are coarser and pass."""
        active = ~self.exact & (target < self.level) & (target >= 0)
        level = self.backend.where(active, target, self.level)
        quantized = self.quantizer.quantize(self.slab, level, self.everything)
        worst = quantized.worst(self.limit)
        self.undone = self.undone | (active & self.backend.isnan(worst))
        passed = active & (worst <= 1.0)
        self.best.replace_rows(self.everything, quantized, passed)
        self.level = self.backend.where(passed, target, self.level)

    def _check_decoded(self) -> None:
        """Rows must be within the limit in the arithmetic of the decoder too; hardly any is not."""
        for values in self.quantizer.decoded_errors(self.slab, self.best, self.everything, self.level).values():
            self.undone = self.undone | (~(values <= self.limit) & ~self.exact)

    def found(self) -> dict[str, Array]:
        """What the host reads of the slab, one entry for every row."""
        backend, best = self.backend, self.best
        errors = {f"error {name}": backend.where(self.exact, 0.0, values) for name, values in best.errors.items()}
        flags = {"exact": self.exact, "top1_kept": best.top1_kept | self.exact, "finite": self.finite}
        stored = stored_arrays(self.quantizer, best, self.level, self.exact)
        return {**stored, **errors, **flags, "done": ~self.undone}
