"""`synthetic[:glyphs][?key=value&...]`: an embedded image set, drawn when asked for; nothing is downloaded.

Each class is a glyph of four strokes. Classes come in families of four: the members share all strokes but one, whose
end lies elsewhere, so that classes are easy to confuse within a family and hard to confuse across. Every image draws
its glyph turned, scaled, slanted, shifted and shaky, in its own colours and stroke width, over an uneven background,
among stray strokes, partly covered, and with noise.

    classes=20       2 to 1000
    n=8000           images (2000 for val): the first n of one endless sequence
    size=32          pixels a side, 16 to 256
    noise=1          amount of pixel noise, 0 to 4
    similarity=0.5   0: members of a family differ plainly, 0.95: hardly at all
    clutter=1        chance of each of two stray strokes, and of the cover, 0 to 1
    split=train      or val: other images of the same classes
    seed=0           other images of the same classes

Image i is a function of (seed, split, i) and of the options but n, and of nothing else, to the last bit, on every
platform (`glyphs` says how), in any order and from any process. Its class is i modulo classes, its key 'train/0000042'.
Images are drawn in blocks when first asked for and kept; a pickled source leaves them behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
from redistill_cache.errors import UsageError

from redistill.sources.base import Sample
from redistill.sources.glyphs import FAMILY, GlyphOptions, draw_glyphs
from redistill.specs import Spec, did_you_mean

__all__ = ["SyntheticSource", "open_synthetic"]

NAMES = ("glyphs",)
SPLITS = {"train": 8000, "val": 2000}  # and how many images each has unless told
# (smallest, largest) of each option that is a number.
LIMITS = {
    "classes": (2, 1000),
    "n": (1, 100_000_000),
    "size": (16, 256),
    "noise": (0, 4),
    "similarity": (0, 0.95),
    "clutter": (0, 1),
    "seed": (0, 2**63 - 1),
}
Number = TypeVar("Number", int, float)

BLOCK = 64
# Larger sets are not kept: each image is then drawn by itself, every time.
KEEP_BYTES = 1 << 30


class SyntheticSource:
    """The first `n` images of a split."""

    def __init__(self, options: GlyphOptions, *, n: int, split: str = "train", spec: str = "synthetic") -> None:
        self.options, self.n, self.split, self.spec = options, n, split, spec
        shown = asdict(options)
        del shown["stream"]
        self.description: Mapping[str, Any] = {"kind": "synthetic", "name": "glyphs", "split": split, "n": n} | shown
        self.class_names: tuple[str, ...] | None = tuple(_class_name(label) for label in range(options.classes))
        self._kept: np.ndarray | None = None
        self._drawn = np.zeros(-(-n // BLOCK), bool)

    def __len__(self) -> int:
        return self.n

    def sample(self, i: int) -> Sample:
        if not 0 <= i < self.n:
            raise IndexError(f"sample {i} of {self.n}")
        return Sample(self._pixels(i), i % self.options.classes, f"{self.split}/{i:07d}")

    def _pixels(self, i: int) -> np.ndarray:
        size = self.options.size
        if self.n * size * size * 3 > KEEP_BYTES:
            single: np.ndarray = draw_glyphs(self.options, np.array([i]))[0]
            return single
        if self._kept is None:
            self._kept = np.empty((self.n, size, size, 3), np.uint8)
        block = i // BLOCK
        if not self._drawn[block]:
            rows = np.arange(block * BLOCK, min((block + 1) * BLOCK, self.n))
            self._kept[rows[0] : rows[-1] + 1] = draw_glyphs(self.options, rows)
            self._drawn[block] = True
        pixels: np.ndarray = self._kept[i]
        pixels.flags.writeable = False  # what is handed out is what the next caller gets
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None, "_drawn": np.zeros_like(self._drawn)}


def open_synthetic(spec: Spec) -> SyntheticSource:
    """A source from `synthetic[:glyphs]?classes=20&n=8000&...`."""
    if spec.name not in ("", *NAMES):
        raise UsageError(f"{spec.text!r}: unknown synthetic images {spec.name!r}; {did_you_mean(spec.name, NAMES)}")
    spec.refuse_unknown({*LIMITS, "split"})
    split = spec.take("split", "train")
    if split not in SPLITS:
        raise UsageError(f"{spec.text!r}: split={split!r} is not one of {', '.join(SPLITS)}")
    defaults = GlyphOptions()
    options = GlyphOptions(
        classes=_number(spec, "classes", defaults.classes),
        size=_number(spec, "size", defaults.size),
        noise=_number(spec, "noise", defaults.noise),
        similarity=_number(spec, "similarity", defaults.similarity),
        clutter=_number(spec, "clutter", defaults.clutter),
        seed=_number(spec, "seed", defaults.seed),
        stream=tuple(SPLITS).index(split),
    )
    return SyntheticSource(options, n=_number(spec, "n", SPLITS[split]), split=split, spec=spec.text)


def _number(spec: Spec, key: str, default: Number) -> Number:
    value = spec.take(key, default)
    low, high = LIMITS[key]
    if not low <= value <= high:
        raise UsageError(f"{spec.text!r}: {key}={value} is not between {low} and {high}")
    return value


def _class_name(label: int) -> str:
    """Family and member: '0a' to '0d' are one family."""
    return f"{label // FAMILY}{'abcd'[label % FAMILY]}"
