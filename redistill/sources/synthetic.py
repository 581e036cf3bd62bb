"""`synthetic[:glyphs][?key=value&...]`: an image set that is drawn on demand; nothing is downloaded.

Each class is a glyph of four strokes. Classes come in families of four whose members differ in one end of one stroke,
so that classes are easy to confuse within a family and hard to confuse across. Every image shows its glyph rotated,
scaled, slanted, shifted and jittered, in its own colours and stroke width, on an uneven background, with stray strokes,
partly covered, and with noise.

    classes=20       2 to 1000
    n=8000           images (2000 for val): the first n of one endless sequence
    size=32          pixels a side, 16 to 256
    noise=1          amount of pixel noise, 0 to 4
    similarity=0.5   0: members of a family differ clearly, 0.95: hardly at all
    clutter=1        probability of each of two stray strokes, and of the cover, 0 to 1
    split=train      or val: other images of the same classes
    seed=0           other images of the same classes

Image i is a function of (seed, split, i) and of the options other than n, bit for bit on every platform: drawing uses
only elementwise arithmetic that IEEE 754 defines exactly, on float64 parameters and float32 pixels. Its class is
i modulo classes, its key 'train/0000042'. Images are drawn in blocks at their first use and cached; a pickled source
does not hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from redistill_cache.errors import UsageError

from redistill.sources.base import Sample
from redistill.specs import Spec, did_you_mean

__all__ = ["GlyphOptions", "SyntheticSource", "draw_glyphs", "open_synthetic"]

NAMES = ("glyphs",)
SPLITS = {"train": 8000, "val": 2000}  # default number of images
# The range of each option that is a number.
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
# Larger sets are not cached: each image is drawn alone, every time.
MAX_CACHE_BYTES = 1 << 30

FAMILY = 4  # classes that differ in one stroke


@dataclass(frozen=True)
class GlyphOptions:
    """The options that determine the pixels of image i of a split."""

    classes: int = 20
    size: int = 32
    noise: float = 1.0
    similarity: float = 0.5
    clutter: float = 1.0
    seed: int = 0
    stream: int = 0  # the split


class SyntheticSource:
    """The first `n` images of a split."""

    def __init__(self, options: GlyphOptions, *, n: int, split: str = "train", spec: str = "synthetic") -> None:
        self.options, self.n, self.split, self.spec = options, n, split, spec
        values = asdict(options)
        del values["stream"]
        self.description: Mapping[str, Any] = {"kind": "synthetic", "name": "glyphs", "split": split, "n": n} | values
        self.class_names: tuple[str, ...] | None = tuple(_class_name(label) for label in range(options.classes))
        self._cached: np.ndarray | None = None
        self._drawn = np.zeros(-(-n // BLOCK), bool)

    def __len__(self) -> int:
        return self.n

    def sample(self, i: int) -> Sample:
        if not 0 <= i < self.n:
            raise IndexError(f"sample {i} of {self.n}")
        return Sample(self._pixels(i), i % self.options.classes, f"{self.split}/{i:07d}")

    def _pixels(self, i: int) -> np.ndarray:
        size = self.options.size
        if self.n * size * size * 3 > MAX_CACHE_BYTES:
            single: np.ndarray = draw_glyphs(self.options, np.array([i]))[0]
            return single
        if self._cached is None:
            self._cached = np.empty((self.n, size, size, 3), np.uint8)
        block = i // BLOCK
        if not self._drawn[block]:
            rows = np.arange(block * BLOCK, min((block + 1) * BLOCK, self.n))
            self._cached[rows[0] : rows[-1] + 1] = draw_glyphs(self.options, rows)
            self._drawn[block] = True
        pixels: np.ndarray = self._cached[i]
        pixels.flags.writeable = False  # the cache is shared by all callers
        return pixels

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None, "_drawn": np.zeros_like(self._drawn)}


def open_synthetic(spec: Spec) -> SyntheticSource:
    """A source from `synthetic[:glyphs]?classes=20&n=8000&...`."""
    if spec.name not in ("", *NAMES):
        raise UsageError(f"{spec.text!r}: unknown synthetic images {spec.name!r}; {did_you_mean(spec.name, NAMES)}")
    spec.refuse_unknown({*LIMITS, "split"})
    split = spec.take("split", "train")
    if split not in SPLITS:
        raise UsageError(f"{spec.text!r}: expected split={' or '.join(SPLITS)}, found {split!r}")
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
        raise UsageError(f"{spec.text!r}: expected {key} from {low} to {high}, found {value}")
    return value


def _class_name(label: int) -> str:
    """Family and member: '0a' to '0d' are one family."""
    return f"{label // FAMILY}{'abcd'[label % FAMILY]}"


# -- drawing: the strokes of a class, and its images ------------------------------------------------------------------

STROKES = 4
STRAY = 2
LATTICE = 5  # cells of the uneven background, per side

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]


@lru_cache(maxsize=8)
def class_strokes(classes: int, similarity: float) -> Floats:
    """The two ends of the strokes of every class, in the square [-1, 1]: [classes, STROKES, 2, 2]."""
    families = -(-classes // FAMILY)
    draws = _Draws((0x676C79706873,), np.arange(families), 16 * STROKES)
    first = draws.between(-0.85, 0.85, STROKES, 2)
    # The other end lies across the middle, so that strokes are long and cross.
    last = -first * draws.between(0.1, 1.0, STROKES, 2) + draws.between(-0.7, 0.7, STROKES, 2)
    base = np.stack([first, last.clip(-0.95, 0.95)], axis=2)
    moves = draws.between(0.55, 0.9, STROKES, 2) * np.where(draws.between(0, 1, STROKES, 2) < 0.5, -1.0, 1.0)
    # A move that would leave the square is reversed.
    moves = np.where(np.abs(base[:, :, 1] + moves) > 1, -moves, moves) * (1 - similarity)
    strokes = np.repeat(base, FAMILY, axis=0)
    member = np.tile(np.arange(FAMILY), families)
    rows = np.arange(len(strokes))
    strokes[rows, member, 1] += moves[rows // FAMILY, member]
    return strokes[:classes]


def draw_glyphs(options: GlyphOptions, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Images `rows` of a split, uint8 [rows, size, size, 3]; image i shows class i mod classes."""
    key = (options.seed, options.stream)
    draws = _Draws((*key, 1), rows, 160)
    strokes, widths = _placed_strokes(options, rows, draws)
    ink_BHW = _coverage(strokes[:, :STROKES], widths[:, :STROKES], options.size)
    stray_BHW = _coverage(strokes[:, STROKES:], widths[:, STROKES:], options.size)
    paper, ink, stray, cover = _colours(draws)
    ground_BHWC = _uneven(draws, options.size)[..., None] + paper[:, None, None].astype(np.float32)
    pixels = ground_BHWC + stray_BHW[..., None] * (stray[:, None, None].astype(np.float32) - ground_BHWC)
    pixels += ink_BHW[..., None] * (ink[:, None, None].astype(np.float32) - pixels)
    _cover(pixels, draws, cover, options)
    pixels += _noise((*key, 2), rows, pixels.shape) * (np.float32(options.noise) * _amount(draws))
    return (pixels.clip(0, 255) + np.float32(0.5)).astype(np.uint8)


def _placed_strokes(options: GlyphOptions, rows: npt.NDArray[np.int64], draws: _Draws) -> tuple[Floats, Floats]:
    """The strokes of each image, stray ones last, and their half widths; the image spans -1 to 1."""
    shape = class_strokes(options.classes, options.similarity)[rows % options.classes]
    shape = shape + draws.between(-0.16, 0.16, STROKES, 2, 2)
    half_turn = draws.between(-0.22, 0.22)  # tan of half the angle: sine and cosine without calling either
    cosine, sine = (1 - half_turn**2) / (1 + half_turn**2), 2 * half_turn / (1 + half_turn**2)
    scale, slant, stretch = draws.between(0.5, 0.85), draws.between(-0.3, 0.3), draws.between(0.8, 1.25)
    x, y = shape[..., 0], shape[..., 1]
    each = (slice(None), None, None)
    x, y = x + slant[each] * y, y * stretch[each]
    x, y = cosine[each] * x - sine[each] * y, sine[each] * x + cosine[each] * y
    shift = draws.between(-0.22, 0.22, 2)[:, None, None]
    placed = np.stack([x, y], axis=-1) * scale[:, None, None, None] + shift
    stray = draws.between(-1, 1, STRAY, 2, 2)
    absent = draws.between(0, 1, STRAY) >= options.clutter
    stray[absent] += 9  # outside the image
    width = draws.between(0.06, 0.13)[:, None] * draws.between(0.8, 1.2, STROKES + STRAY)
    return np.concatenate([placed, stray], axis=1), width


def _coverage(strokes: Floats, widths: Floats, size: int) -> Pixels:
    """The share of each pixel that the strokes cover, 0 to 1, [images, size, size]."""
    centres = ((np.arange(size) * 2 + 1) / size - 1).astype(np.float64)
    nearest = None
    for k in range(strokes.shape[1]):
        start, along = strokes[:, k, 0], strokes[:, k, 1] - strokes[:, k, 0]
        length = np.sqrt(along[:, 0] * along[:, 0] + along[:, 1] * along[:, 1]) + 1e-6
        dx, dy = along[:, 0] / length, along[:, 1] / length
        # The position of a pixel along and across the stroke is a term of its column plus a term of its row.
        s = _sum((centres - start[:, :1]) * dx[:, None], (centres - start[:, 1:]) * dy[:, None])
        t = _sum((centres - start[:, :1]) * -dy[:, None], (centres - start[:, 1:]) * dx[:, None])
        s -= np.minimum(np.maximum(s, np.float32(0)), length[:, None, None].astype(np.float32))
        s *= s
        t *= t
        s += t
        np.sqrt(s, out=s)
        s -= widths[:, k, None, None].astype(np.float32)
        nearest = s if nearest is None else np.minimum(nearest, s, out=nearest)
    assert nearest is not None
    nearest *= np.float32(-0.5 * size)  # in pixels, positive inside
    nearest += np.float32(0.5)
    return np.clip(nearest, 0, 1, out=nearest)


def _sum(by_column: Floats, by_row: Floats) -> Pixels:
    return by_column.astype(np.float32)[:, None, :] + by_row.astype(np.float32)[:, :, None]


def _colours(draws: _Draws) -> tuple[Floats, Floats, Floats, Floats]:
    """Paper, ink, stray ink and cover: the ink is lighter or darker than the paper by a visible amount."""
    paper = draws.between(70, 185, 3)
    contrast = draws.between(35, 110, 1) * np.where(draws.between(0, 1, 1) < 0.5, -1.0, 1.0)
    ink = paper + contrast + draws.between(-45, 45, 3)
    stray = paper + (ink - paper) * draws.between(0.3, 1.0, 1) + draws.between(-30, 30, 3)
    return paper, ink, stray, draws.between(20, 235, 3)


def _uneven(draws: _Draws, size: int) -> Pixels:
    """A slowly varying background: random values on a lattice, interpolated bilinearly."""
    lattice = draws.between(-1, 1, LATTICE, LATTICE) * draws.between(5, 45)[:, None, None]
    position = (np.arange(size) + 0.5) * ((LATTICE - 1) / size)
    cell = position.astype(np.int64)
    share = position - cell
    rows = lattice[:, cell] * (1 - share)[:, None] + lattice[:, cell + 1] * share[:, None]
    values: Floats = rows[:, :, cell] * (1 - share) + rows[:, :, cell + 1] * share
    return values.astype(np.float32)


def _cover(pixels: Pixels, draws: _Draws, colour: Floats, options: GlyphOptions) -> None:
    """Cover a rectangle of each image, at most a third of its width and height."""
    low = draws.between(0, 0.85, 2) * options.size
    high = low + draws.between(0.1, 0.33, 2) * options.size
    covered = draws.between(0, 1) < options.clutter
    pixel = np.arange(options.size)
    x = (pixel >= low[:, :1]) & (pixel < high[:, :1]) & covered[:, None]
    y = (pixel >= low[:, 1:]) & (pixel < high[:, 1:])
    image, row, column = np.nonzero(y[:, :, None] & x[:, None, :])
    pixels[image, row, column] = colour[image].astype(np.float32)


def _amount(draws: _Draws) -> Pixels:
    return draws.between(8, 30)[:, None, None, None].astype(np.float32)


def _noise(key: tuple[int, ...], rows: npt.NDArray[np.int64], shape: tuple[int, ...]) -> Pixels:
    """Nearly normal noise of standard deviation 1: the sums of the four bytes of 32-bit words."""
    count = int(np.prod(shape[1:], dtype=np.int64))
    words = _words(key, rows, -(-count // 2)).astype("<u8").view("<u4")[:, :count]
    pairs = (words & np.uint32(0x00FF00FF)) + ((words >> np.uint32(8)) & np.uint32(0x00FF00FF))
    sums = (pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))
    return ((sums.astype(np.float32) - np.float32(510)) * np.float32(1 / 147.8)).reshape(shape)


# -- random numbers by counter ----------------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64: every bit of the output depends on every bit of the input."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _words(key: tuple[int, ...], rows: npt.NDArray[np.int64], count: int) -> Words:
    """Random words [rows, count]: each a function of key, row and column."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    rows_N1 = _mix(_mix(state ^ rows.astype(np.uint64))[:, None])
    return _mix(rows_N1 + np.arange(count, dtype=np.uint64) * _GOLDEN)


class _Draws:
    """Uniform numbers in [0, 1) for some rows, consumed column by column."""

    def __init__(self, key: tuple[int, ...], rows: npt.NDArray[np.int64], count: int) -> None:
        self.values = (_words(key, rows, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        self.used = 0

    def between(self, low: float, high: float, *shape: int) -> Floats:
        """The next numbers, in [low, high), [rows, *shape]."""
        count = int(np.prod(shape, dtype=np.int64))
        block = self.values[:, self.used : self.used + count]
        assert block.shape[1] == count, "more draws than requested"
        self.used += count
        return (low + block * (high - low)).reshape(len(block), *shape)
