"""Fitting the linear codec to a pilot, the first rows of the teacher: a basis, then a step, then the packing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from redistill_cache.codecs.backend import Backend
from redistill_cache.codecs.linear import LinearCodec
from redistill_cache.codecs.linear_decode import LEVELS_PER_OCTAVE, LinearDecoder, Packing
from redistill_cache.codecs.linear_encode import (
    LARGEST_VALUE,
    LEAST_FLOOR,
    LinearSettings,
    Quantizer,
    search_coefficients,
)
from redistill_cache.codecs.rounding import Factors
from redistill_cache.codecs.stats import Centre

__all__ = ["fit_linear", "fit_packing", "spans"]

# A row starts two octaves below the coarsest step, so that it can get a finer or a coarser one.
START_LEVEL = 2 * LEVELS_PER_OCTAVE
# Storing the basis as integers may add this share of the noise that rounding adds.
BASIS_NOISE = 0.01
# Rows of the pilot on which the step and the packing are chosen.
STEP_ROWS, PACKING_ROWS = 384, 1536
STEP_ROUNDS = 7
PACKING_ROUNDS = 2
# Rows are taken in pieces of so many values where float64 copies of all would take gigabytes.
PIECE_VALUES = 1 << 24
# The target of the mean error on the pilot, in units of the bound: below 1, so that other rows meet the bound too.
MEAN_TARGET, CERTIFIED_TARGET = 0.93, 0.8
# The largest error that a row adds to the mean, in units of the bound. With more, the few rows of a saturated teacher
# whose largest class a step exchanges would decide the step of all.
MOST_ERROR, MOST_CERTIFIED_ERROR = 100, 10
MAX_FITTED_RANK = 2048
# Rows of features nearer to the offset than this share of the median distance are held to the error of that distance.
FLOOR_OF_MEDIAN = 0.1
# Weights of errors at T = 1 relative to those at T = 4.
LEAST_WEIGHT, MOST_WEIGHT, CERTIFIED_WEIGHT = 0.15, 4.0, 0.4


def fit_linear(rows: np.ndarray, settings: LinearSettings, head: tuple[np.ndarray, np.ndarray] | None) -> LinearCodec:
    """A codec for rows like these (float32 [n, width], finite); with a head (weight, bias), its axes are the basis."""
    # Rows with larger values are stored exactly with any basis. Copies of a pilot of many classes would be large.
    fits = np.maximum(rows.max(1), -rows.min(1)) <= LARGEST_VALUE / 4
    rows = rows if fits.all() else rows[fits]
    if not len(rows):
        rows = np.zeros((1, rows.shape[1]), np.float32)
    weight = CERTIFIED_WEIGHT if settings.certified else LEAST_WEIGHT
    settings = replace(settings, level=START_LEVEL, weight=weight)
    # The step and the packing are chosen on rows that the basis was not fitted to, if there are enough.
    held_out = len(rows) // 4 if len(rows) >= 16 and head is None else 0
    basis_rows, other_rows = rows[: len(rows) - held_out], rows[len(rows) - held_out :] if held_out else rows
    basis = _basis(basis_rows, settings, head)
    if settings.metric != "kl":
        settings = _with_size(settings, rows, basis.offset.astype(np.float32))
    step_rows = _spaced(other_rows, STEP_ROWS)
    step = _first_step(step_rows, basis, settings)
    for _ in range(STEP_ROUNDS):
        means = _mean_errors(_unpacked(basis, step, settings, step_rows), step_rows)
        change = _step_change(means, settings)
        step *= change
        settings = _reweighted(means, settings)
        if abs(np.log2(change)) < 0.02:
            break
    packing_rows = _spaced(other_rows, PACKING_ROWS)
    unpacked = _unpacked(basis, step, settings, packing_rows)
    decoder = replace(unpacked.decoder, packing=fit_packing(search_coefficients(unpacked, packing_rows)))
    quantizer = Quantizer(decoder, settings, Backend(), unpacked.factors)
    del unpacked  # its constants are large where there are many classes
    for _ in range(PACKING_ROUNDS):
        # Digits are narrow, and rounding to values within them adds a little error.
        means = _mean_errors(quantizer, step_rows)
        decoder = _rescaled(decoder, _step_change(means, settings))
        quantizer = Quantizer(decoder, settings, Backend())
    return LinearCodec(decoder, settings, "svd" if head is None else "head")


def _with_size(settings: LinearSettings, rows: np.ndarray, offset: np.ndarray) -> LinearSettings:
    """The settings with what the errors of features are relative to."""
    if settings.metric == "centred":
        floor = FLOOR_OF_MEDIAN * float(np.median(Centre(offset, 0.0).size(rows)))
        settings = replace(settings, floor=max(floor, LEAST_FLOOR))
    size = _usual_square(rows, settings, offset)
    return replace(settings, reference=float(np.clip(1.0 / max(size, 1e-70), 1e-70, 1e30)))


def _usual_square(rows: np.ndarray, settings: LinearSettings, offset: np.ndarray) -> float:
    """The square of what errors of features are usually relative to."""
    if settings.metric == "centred":  # the median, as one far row must not make the step too coarse for all others
        return float(np.median(Centre(offset, settings.floor).size(rows))) ** 2
    return float(np.mean(rows.astype(np.float64) ** 2) * rows.shape[1])


def _basis(rows: np.ndarray, settings: LinearSettings, head: tuple[np.ndarray, np.ndarray] | None) -> Basis:
    shift_free = settings.metric == "kl"
    if rows.shape[1] > MAX_GRAM:
        rows = _spaced(rows, MAX_GRAM)
    if head is not None:
        basis = head_basis(*head, rows, shift_free=shift_free)
    else:
        basis = principal_basis(_centred(rows, shift_free), shift_free=shift_free, max_rank=MAX_FITTED_RANK)
    if len(basis.rows):
        return basis
    # One class, or a teacher with constant outputs: a direction that is never used.
    return Basis(np.full((1, rows.shape[1]), rows.shape[1] ** -0.5), basis.offset, np.zeros(1))


def _centred(rows: np.ndarray, shift_free: bool) -> np.ndarray:
    centred = rows.astype(np.float64)
    if shift_free:
        centred -= centred.mean(1, keepdims=True)
    return centred


def _first_step(rows: np.ndarray, basis: Basis, settings: LinearSettings) -> float:
    """The step at which white rounding noise would reach the bound."""
    if settings.metric == "kl":
        noise = 4.0 * settings.fidelity * rows.shape[1]
    else:
        noise = settings.fidelity**2 * _usual_square(rows, settings, basis.offset.astype(np.float32))
    return float(np.clip(np.sqrt(12.0 * noise / len(basis.rows)), 1e-20, 1e20))


def _unpacked(basis: Basis, step: float, settings: LinearSettings, rows: np.ndarray) -> Quantizer:
    """A quantizer with an empty packing: every nonzero coefficient escapes. Its spread is that of `rows`."""
    rank = len(basis.rows)
    integers, scale = quantize_basis(basis, step * (BASIS_NOISE * rank / 12.0) ** 0.5)
    steps = np.full(rank, step * 2.0 ** (START_LEVEL / LEVELS_PER_OCTAVE), np.float32)
    offset = basis.offset.astype(np.float32)
    bare = LinearDecoder(integers, scale, steps, offset, np.ones(rank, np.float32), Packing.empty(rank))
    quantizer = Quantizer(bare, settings, Backend())
    spread = sum(np.abs(quantizer.project(piece)[0]).sum(0) for piece in _pieces(rows)) / len(rows)
    decoder = replace(bare, spread=spread.astype(np.float32))
    return Quantizer(decoder, settings, Backend(), quantizer.factors, fitting=True)


def _mean_errors(quantizer: Quantizer, rows: np.ndarray) -> dict[str, float]:
    """Mean errors of rows at their starting levels, those of single rows capped: they get a finer step of their own."""
    most = (MOST_CERTIFIED_ERROR if quantizer.settings.certified else MOST_ERROR) * quantizer.settings.fidelity
    errors: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(rows), quantizer.slab_rows):
        slab = quantizer.prepare(rows[start : start + quantizer.slab_rows])
        for name, values in quantizer.first(slab).errors.items():
            errors.setdefault(name, []).append(np.minimum(values, most))
    return {name: float(np.concatenate(parts).mean()) for name, parts in errors.items()}


def _step_change(means: dict[str, float], settings: LinearSettings) -> float:
    """The factor by which to change the step so that the mean errors reach the target."""
    target = CERTIFIED_TARGET if settings.certified else MEAN_TARGET
    power = 0.5 if settings.metric == "kl" else 1.0
    return float(np.clip((target * settings.fidelity / max(*means.values(), 1e-30)) ** power, 0.05, 20.0))


def _reweighted(means: dict[str, float], settings: LinearSettings) -> LinearSettings:
    """Errors at T = 1 get more weight where they are larger than those at T = 4."""
    if settings.metric != "kl" or settings.certified:
        return settings
    excess = np.clip(means["kl_t1"] / max(means["kl_t4"], 1e-30), 0.25, 4.0) ** 0.7
    return replace(settings, weight=float(np.clip(settings.weight * excess, LEAST_WEIGHT, MOST_WEIGHT)))


def _rescaled(decoder: LinearDecoder, factor: float) -> LinearDecoder:
    step = (decoder.step * factor).astype(np.float32)
    return replace(decoder, step=step, spread=(decoder.spread / factor).astype(np.float32))


def _pieces(rows: np.ndarray) -> Iterator[np.ndarray]:
    count = max(1, PIECE_VALUES // rows.shape[1])
    yield from (rows[start : start + count] for start in range(0, len(rows), count))


def _spaced(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(np.int64)]


# -- basis ------------------------------------------------------------------------------------------------------------
#
# `svd`: the principal directions of the pilot's rows. With few rows and classes they are completed to all width - 1 (or
# width) directions, so that they span every row. `head`: the rows of the teacher's last layer, if the caller passes it;
# rectified features are sparse, and their axes then need fewer bytes than the principal ones. Both are rows of unit
# length, stored as integer[k] * scale[k]; the scale of a row follows from how much the signal varies along it, so that
# storing the basis adds a hundredth of the noise that rounding adds, in fewer bytes than float16.

MAX_COMPLETED_WIDTH = 1024
# With more classes, so many rows of the pilot are enough: they bound the size of a product, and memory.
MAX_GRAM = 4096
INTEGER_LIMIT = 32767


@dataclass(frozen=True)
class Basis:
    """Unit rows [r, width], the offset, and how much the pilot varies along each row (rms)."""

    rows: np.ndarray  # float64
    offset: np.ndarray  # float64 [width]
    spread: np.ndarray  # float64 [r]


def principal_basis(rows: np.ndarray, *, shift_free: bool, max_rank: int) -> Basis:
    """Principal directions of centred rows (float64 [n, width]), largest first."""
    width = rows.shape[1]
    offset = rows.mean(0)
    centred = rows - offset
    largest = float(np.abs(centred).max(initial=0.0))
    if largest == 0.0:
        directions = np.zeros((0, width))
        spread = np.zeros(0)
    else:
        directions, spread = _principal(centred / largest)
        spread = spread * largest
    full_rank = width - 1 if shift_free else width
    if width <= MAX_COMPLETED_WIDTH and full_rank <= max_rank and not spans(rows):
        others = complete(directions, shift_free=shift_free)
        directions = np.concatenate([directions, others])
        spread = np.concatenate([spread, np.zeros(len(others))])
    return Basis(directions[:max_rank], offset, spread[:max_rank])


def spans(rows: np.ndarray) -> bool:
    """Twice as many rows as values span every direction that a linear head can output; fewer may not."""
    return bool(len(rows) >= 2 * rows.shape[1])


def _principal(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count, width = centred.shape
    if width <= count:
        values, vectors = np.linalg.eigh(centred.T @ centred / count)
        directions = vectors.T
    else:
        values, vectors = np.linalg.eigh(centred @ centred.T / count)
        directions = vectors.T @ centred
    order = np.argsort(-values, kind="stable")
    # The square keeps half the digits of float64; smaller values are noise of the product, not of the teacher.
    order = order[values[order] > 1e-12 * values.max()]
    directions = directions[order]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions, np.sqrt(values[order])


def complete(directions: np.ndarray, *, shift_free: bool) -> np.ndarray:
    """Unit rows that complete orthonormal directions to a basis of all rows (of all of zero mean, if shift_free)."""
    width = directions.shape[1]
    fixed = [directions]
    if shift_free:
        fixed.append(np.full((1, width), width**-0.5))
    known = np.concatenate(fixed)
    if len(known) >= width:
        return np.zeros((0, width))
    q, _ = np.linalg.qr(np.concatenate([known.T, np.eye(width)], axis=1))
    return np.ascontiguousarray(q[:, len(known) : width].T)


def head_basis(weight: np.ndarray, bias: np.ndarray, rows: np.ndarray, *, shift_free: bool) -> Basis:
    """The columns of a linear head [width, d] as unit rows; `rows` are logits it output."""
    axes = np.asarray(weight, np.float64).T
    offset = np.asarray(bias, np.float64)
    if shift_free:
        axes = axes - axes.mean(1, keepdims=True)
        offset = offset - offset.mean()
    norms = np.linalg.norm(axes, axis=1, keepdims=True)
    axes = axes[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
    inverse = Factors.of(axes).inverse
    squares = sum((((_centred(piece, shift_free) - offset) @ inverse) ** 2).sum(0) for piece in _pieces(rows))
    spread = np.sqrt(squares / len(rows))
    order = np.argsort(-spread, kind="stable")
    return Basis(axes[order], offset, spread[order])


def quantize_basis(basis: Basis, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Integer rows and scales that add an error of rms norm `noise` to rows like the pilot's."""
    rank, width = basis.rows.shape
    largest = np.abs(basis.rows).max(1, initial=0.0)
    allowed = noise * np.sqrt(12.0 / max(rank * width, 1)) / np.maximum(basis.spread, 1e-300)
    # At least 4 bits, so that a direction keeps its shape, and at most 16.
    scale = np.clip(allowed, largest / INTEGER_LIMIT, largest / 15)
    scale = scale.astype(np.float32)
    integers = np.rint(basis.rows / scale[:, None].astype(np.float64))
    return np.clip(integers, -INTEGER_LIMIT - 1, INTEGER_LIMIT).astype(np.int16), scale


# -- packing ----------------------------------------------------------------------------------------------------------

# The share of the pilot's rows in which a coefficient may be outside its digits. Narrow digits leave room for others
# in a byte, and the encoder avoids values outside, since it counts an escape as many bits. Above FEW_VALUES values, a
# wider digit costs little, and rounding to values within a narrow one would add more error.
OUTSIDE, OUTSIDE_OF_MANY = 0.03, 0.003
FEW_VALUES = 9
WIDEST = 255 * 256


def fit_packing(k: np.ndarray) -> Packing:
    """The packing for coefficients like these (integers [n, r]): digits, their bytes, and the order of symbols."""
    rank = k.shape[1]
    ordered = np.sort(k, axis=0)
    low, high = _range(ordered, OUTSIDE)
    many = high - low + 1 > FEW_VALUES
    low[many], high[many] = _range(ordered[:, many], OUTSIDE_OF_MANY)
    wide = high - low >= 256
    high = np.minimum(high, low + WIDEST - 1)
    slots = [_Slot(c, int(high[c] - low[c] + 1), int(low[c]), k[:, c] - low[c]) for c in range(rank) if not wide[c]]
    for c in np.flatnonzero(wide):
        # The first digit is as narrow as possible: its values are equally likely, so the second one tells nothing
        # about it. A first digit of radix 256 would tell much about the second, which a code for bytes cannot use.
        radix = -(-int(high[c] - low[c] + 1) // 256)
        lowest, highest = int(low[c]) // radix, int(high[c]) // radix
        if highest - lowest >= 256:
            radix += 1
            lowest, highest = int(low[c]) // radix, int(high[c]) // radix
        slots.append(_Slot(int(c), radix, 0, k[:, c] % radix, first_of_two=True))
        slots.append(_Slot(int(c), highest - lowest + 1, lowest, k[:, c] // radix - lowest, second=True))
    return _arranged(rank, [slot for slot in slots if slot.radix > 1])


def _range(ordered: np.ndarray, outside: float) -> tuple[np.ndarray, np.ndarray]:
    """The range of every column without the outermost values, but with zero, the value in rows stored exactly."""
    tail = int(len(ordered) * outside / 2)
    low = np.minimum(ordered[tail], 0).astype(np.int64)
    high = np.maximum(ordered[len(ordered) - 1 - tail], 0).astype(np.int64)
    return low, high


class _Slot:
    """A digit and the frequencies of its values."""

    def __init__(
        self,
        coefficient: int,
        radix: int,
        low: int,
        digits: np.ndarray,
        *,
        first_of_two: bool = False,
        second: bool = False,
    ) -> None:
        self.coefficient = coefficient
        self.radix = radix
        self.low = low
        self.first_of_two = first_of_two  # cannot be widened: that would change the weight of the second
        self.second = second
        self.values = low + digits
        self._count()

    def _count(self) -> None:
        digits = np.clip(self.values - self.low, 0, self.radix - 1)
        counts = np.bincount(digits, minlength=self.radix) + 0.5
        # Orders values that did not occur: those further out are less likely.
        counts -= 0.4 * np.abs(np.arange(self.radix) + self.low) / (self.radix + abs(self.low))
        self.log_share = np.log2(counts / counts.sum())
        self.bits = float(-(np.exp2(self.log_share) * self.log_share).sum())

    def widen(self, radix: int) -> None:
        """Widen to this radix on both sides, or on one side where all values are on one side of zero."""
        more = radix - self.radix
        self.low -= 0 if self.low == 0 else more // 2
        self.radix = radix
        self._count()


def _arranged(rank: int, slots: list[_Slot]) -> Packing:
    bytes_ = _balanced_radices(slots)
    if not bytes_:
        return Packing.empty(rank)
    for members in bytes_:
        _widen(members)
    # Least information first: zstd's optimal parser starts without statistics, and the first columns teach it that
    # repetitions cost more than single bytes. In descending order its result is up to 6 % larger, and erratic.
    bytes_.sort(key=lambda members: (sum(slot.bits for slot in members), members[0].coefficient))
    # The first slot of a coefficient must come before its second one, whose weight is then the radix of the first.
    bytes_.sort(key=lambda members: any(slot.second for slot in members))
    flat = [(slot, index) for index, members in enumerate(bytes_) for slot in members]
    return Packing(
        rank,
        np.array([slot.coefficient for slot, _ in flat], np.uint16),
        np.array([slot.radix for slot, _ in flat], np.uint16),
        np.array([slot.low for slot, _ in flat], np.int16),
        np.array([index for _, index in flat], np.uint16),
        np.stack([_ranked(members) for members in bytes_]),
    )


def _balanced_radices(slots: list[_Slot]) -> list[list[_Slot]]:
    """Slots in as few bytes as a sequential packing takes, with about the same information in every byte."""
    slots = sorted(slots, key=lambda slot: (-slot.bits, slot.coefficient, slot.second))
    count = _sequential_count(slots)
    while True:
        bytes_ = _greedy(slots, count)
        if bytes_ is not None:
            return bytes_
        count += 1


def _sequential_count(slots: list[_Slot]) -> int:
    count, product = 0, 257
    for slot in slots:
        if product * slot.radix > 256:
            count, product = count + 1, 1
        product *= slot.radix
    return count


def _greedy(slots: list[_Slot], count: int) -> list[list[_Slot]] | None:
    """Every slot, in descending order of information, into the emptiest byte that has room; None if none has."""
    members: list[list[_Slot]] = [[] for _ in range(count)]
    product = np.ones(count, np.int64)
    bits = np.zeros(count)
    for slot in slots:
        room = np.flatnonzero(product * slot.radix <= 256)
        if not len(room):
            return None
        chosen = int(room[np.argmin(bits[room])])
        members[chosen].append(slot)
        product[chosen] *= slot.radix
        bits[chosen] += slot.bits
    return [byte for byte in members if byte]


def _widen(members: list[_Slot]) -> None:
    """Widen digits to fill their byte: fewer escapes at no cost."""
    product = int(np.prod([slot.radix for slot in members]))
    for slot in sorted((slot for slot in members if not slot.first_of_two), key=lambda slot: -slot.radix):
        others = product // slot.radix
        slot.widen(256 // others)
        product = others * slot.radix


def _ranked(members: list[_Slot]) -> np.ndarray:
    """The numbers of a byte, the most frequent first; those that cannot occur last."""
    share = np.zeros(1)
    for slot in members:
        share = (slot.log_share[:, None] + share[None, :]).reshape(-1)
    order = np.argsort(-share, kind="stable")
    return np.concatenate([order, np.arange(len(order), 256)]).astype(np.uint8)
