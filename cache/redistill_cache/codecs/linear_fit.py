"""Fitting the linear codec to a pilot, the first rows a teacher said: a basis, then a step, then digits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from redistill_cache.codecs.linear import LinearCodec
from redistill_cache.codecs.linear_decode import LEVELS_PER_OCTAVE, LinearDecoder, Packing
from redistill_cache.codecs.linear_encode import LARGEST_VALUE, Trials, search_coefficients
from redistill_cache.codecs.rounding import LinearSettings
from redistill_cache.codecs.space import Space

__all__ = ["Basis", "complete", "fit_linear", "fit_packing", "head_basis", "principal_basis", "quantize"]


# -- packing fit ------------------------------------------------------------------------------------------------------
#
# Designing a packing from the coefficients of a pilot: which digits, in which bytes, in which order.

# A coefficient outgrows its digits in this share of the pilot's rows. Narrow digits leave bytes for others, and the
# encoder avoids what outgrows them, since it counts an escape as many bits.
OUTGROWN, OUTGROWN_IF_RICH = 0.03, 0.003
FEW_VALUES = 9
WIDEST = 255 * 256


def fit_packing(k: np.ndarray) -> Packing:
    """For coefficients like these (integers [n, r])."""
    rank = k.shape[1]
    ordered = np.sort(k, axis=0)
    low, high = _range(ordered, OUTGROWN)
    # Where the digit is large, a few more values cost little, and staying within it would cost much.
    rich = high - low + 1 > FEW_VALUES
    low[rich], high[rich] = _range(ordered[:, rich], OUTGROWN_IF_RICH)
    wide = high - low >= 256
    high = np.minimum(high, low + WIDEST - 1)
    slots = [_Slot(c, int(high[c] - low[c] + 1), int(low[c]), k[:, c] - low[c]) for c in range(rank) if not wide[c]]
    for c in np.flatnonzero(wide):
        shifted = k[:, c] - low[c]
        upper = -(-int(high[c] - low[c] + 1) // 256)
        lower_low = int(low[c]) % 256 - 256
        upper_low = (int(low[c]) - lower_low) // 256
        slots.append(_Slot(int(c), 256, lower_low, shifted % 256))
        slots.append(_Slot(int(c), upper, upper_low, shifted // 256, second=True))
    return _arranged(rank, [slot for slot in slots if slot.radix > 1])


def _range(ordered: np.ndarray, outgrown: float) -> tuple[np.ndarray, np.ndarray]:
    """Without the outermost values of every column; with zero, which is what an exact row holds."""
    tail = int(len(ordered) * outgrown / 2)
    low = np.minimum(ordered[tail], 0).astype(np.int64)
    high = np.maximum(ordered[len(ordered) - 1 - tail], 0).astype(np.int64)
    return low, high


class _Slot:
    """A digit and how often each of its values came up."""

    def __init__(self, coefficient: int, radix: int, low: int, digits: np.ndarray, *, second: bool = False) -> None:
        self.coefficient = coefficient
        self.radix = radix
        self.low = low
        self.second = second
        self.values = low + digits
        self._count()

    def _count(self) -> None:
        digits = np.clip(self.values - self.low, 0, self.radix - 1)
        counts = np.bincount(digits, minlength=self.radix) + 0.5
        # Values never seen are the less likely the further out they are; it only orders them.
        counts -= 0.4 * np.abs(np.arange(self.radix) + self.low) / (self.radix + abs(self.low))
        self.log_share = np.log2(counts / counts.sum())
        self.bits = float(-(np.exp2(self.log_share) * self.log_share).sum())

    @property
    def whole(self) -> bool:
        """Whether it is the lower half of a wide coefficient, all of whose values mean something."""
        return self.radix == 256

    def widen(self, radix: int) -> None:
        """To this radix, on both sides, or on one where all values lie on one side of zero."""
        more = radix - self.radix
        self.low -= 0 if self.low == 0 and not self.second else more // 2
        self.radix = radix
        self._count()


def _arranged(rank: int, slots: list[_Slot]) -> Packing:
    bytes_ = _balanced_radices(slots)
    if not bytes_:
        return Packing.empty(rank)
    # The first slot of a coefficient comes before its second one: only then are their weights 1 and 256.
    for members in bytes_:
        _use_up(members)
    bytes_.sort(key=lambda members: (-sum(slot.bits for slot in members), members[0].coefficient))
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
    """Slots in as few bytes as a sequential packing takes, every byte as full of information as the others."""
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
    """Every slot, the richest first, into the emptiest byte that has room for it."""
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


def _use_up(members: list[_Slot]) -> None:
    """Widen digits by the room that is left in their byte: fewer escapes for nothing."""
    if any(slot.whole for slot in members):
        return
    product = int(np.prod([slot.radix for slot in members]))
    for slot in sorted(members, key=lambda slot: -slot.radix):
        others = product // slot.radix
        slot.widen(256 // others)
        product = others * slot.radix


def _ranked(members: list[_Slot]) -> np.ndarray:
    """The numbers of a byte, likeliest first; those that cannot occur last."""
    share = np.zeros(1)
    for slot in members:
        share = (slot.log_share[:, None] + share[None, :]).reshape(-1)
    order = np.argsort(-share, kind="stable")
    return np.concatenate([order, np.arange(len(order), 256)]).astype(np.uint8)


# -- basis ------------------------------------------------------------------------------------------------------------
#
# The basis of the linear codec: where it comes from, and how it is stored in fewer bytes than float16.
#
# Three sources. `svd`: the principal directions of the pilot's logits; where rows and classes are few it is
# completed to all width - 1 (or width) directions, so that no row can fall outside. `head`: the rows of the
# teacher's last layer, when the caller gives it; rectified features are sparse, and then their own axes beat the
# principal ones. Both are rows of unit length, and both are stored as integers: row k as integer[k] * scale[k], with
# the scale of a row chosen by how much the signal varies along it, so that the whole basis adds a hundredth of the
# noise that rounding is going to add.

MAX_COMPLETED_WIDTH = 1024
MAX_GRAM = 4096
INTEGER_LIMIT = 32767


@dataclass(frozen=True)
class Basis:
    """Unit rows [r, width], the offset they are measured from, and how much the pilot varies along each (rms)."""

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
    whole = width - 1 if shift_free else width
    # Twice as many rows as values show every direction that a linear head can produce; fewer may not.
    if width <= MAX_COMPLETED_WIDTH and whole <= max_rank and len(rows) < 2 * width:
        missing = complete(directions, shift_free=shift_free)
        directions = np.concatenate([directions, missing])
        spread = np.concatenate([spread, np.zeros(len(missing))])
    return Basis(directions[:max_rank], offset, spread[:max_rank])


def _principal(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count, width = centred.shape
    if width > MAX_GRAM and count > MAX_GRAM:
        centred = centred[np.linspace(0, count - 1, MAX_GRAM).astype(np.int64)]
        count = MAX_GRAM
    if width <= count:
        values, vectors = np.linalg.eigh(centred.T @ centred / count)
        directions = vectors.T
    else:
        values, vectors = np.linalg.eigh(centred @ centred.T / count)
        directions = vectors.T @ centred
    order = np.argsort(-values, kind="stable")
    # Half the digits of float64 survive the square; what is below is noise of the product, not of the teacher.
    order = order[values[order] > 1e-12 * values.max()]
    directions = directions[order]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions, np.sqrt(values[order])


def complete(directions: np.ndarray, *, shift_free: bool) -> np.ndarray:
    """Unit rows that make orthonormal directions span everything (everything of zero mean, if shift_free)."""
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
    """The columns of a linear head [width, d] as unit rows; `rows` are pilot logits it produced, not centred."""
    axes = np.asarray(weight, np.float64).T
    offset = np.asarray(bias, np.float64)
    if shift_free:
        axes = axes - axes.mean(1, keepdims=True)
        offset = offset - offset.mean()
    norms = np.linalg.norm(axes, axis=1, keepdims=True)
    axes = axes[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
    coefficients = np.linalg.lstsq(axes.T, (rows - offset).T, rcond=None)[0]
    spread = np.sqrt((coefficients**2).mean(1))
    order = np.argsort(-spread, kind="stable")
    return Basis(axes[order], offset, spread[order])


def quantize(basis: Basis, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Integer rows and their scales, such that coefficients of the pilot's spread err by `noise` in norm (rms)."""
    rank, width = basis.rows.shape
    largest = np.abs(basis.rows).max(1, initial=0.0)
    allowed = noise * np.sqrt(12.0 / max(rank * width, 1)) / np.maximum(basis.spread, 1e-300)
    # Never so coarse that a direction loses its shape, never finer than 16 bits.
    scale = np.clip(allowed, largest / INTEGER_LIMIT, largest / 15)
    scale = scale.astype(np.float32)
    integers = np.rint(basis.rows / scale[:, None].astype(np.float64))
    return np.clip(integers, -INTEGER_LIMIT - 1, INTEGER_LIMIT).astype(np.int16), scale


# -- linear fit -------------------------------------------------------------------------------------------------------

# A row starts two octaves below the coarsest step, so that there is room both ways.
START_LEVEL = 2 * LEVELS_PER_OCTAVE
# The basis may add this share of the noise that rounding adds.
BASIS_NOISE = 0.01
# Rows on which the step is chosen, and on which digits are.
STEP_ROWS, DIGIT_ROWS = 384, 1536
STEP_ROUNDS = 7
DIGIT_ROUNDS = 2
# Where the mean error of the pilot is put, so that other rows meet the bound in the mean too.
AIM_OF_MEAN, AIM_OF_CERTIFIED = 0.93, 0.8
MAX_RANK = 2048
# Of errors at T = 1 against errors at T = 4, in what the encoder decides.
LEAST_WEIGHT, MOST_WEIGHT, CERTIFIED_WEIGHT = 0.15, 4.0, 0.4


def fit_linear(rows: np.ndarray, policy: LinearSettings, head: tuple[np.ndarray, np.ndarray] | None) -> LinearCodec:
    """A codec for rows like these (float32 [n, width], finite). `policy.level` is chosen here."""
    # What is beyond these is stored exactly whatever the basis.
    sane = rows[np.abs(rows).max(1) <= LARGEST_VALUE / 4]
    rows = sane if len(sane) else np.zeros((1, rows.shape[1]), np.float32)
    weight = CERTIFIED_WEIGHT if policy.certified else LEAST_WEIGHT
    policy = replace(policy, level=START_LEVEL, weight=weight)
    if policy.metric == "relative":
        size = float(np.mean(rows.astype(np.float64) ** 2) * rows.shape[1])
        policy = replace(policy, reference=float(np.clip(1.0 / max(size, 1e-70), 1e-70, 1e30)))
    # Steps and digits are chosen on rows the basis has not seen, where there are enough.
    held_out = len(rows) // 4 if len(rows) >= 16 and head is None else 0
    seen, held = rows[: len(rows) - held_out], rows[len(rows) - held_out :] if held_out else rows
    basis = _basis(seen, policy, head)
    probe = _spaced(held, STEP_ROWS)
    step = _first_step(probe, basis, policy)
    for _ in range(STEP_ROUNDS):
        means = _mean_errors(_synthesis(basis, step, policy, probe), policy, probe)
        change = _change(means, policy)
        step *= change
        policy = _balanced(means, policy)
        if abs(np.log2(change)) < 0.02:
            break
    synthesis = _synthesis(basis, step, policy, held)
    k = search_coefficients(synthesis, policy, _spaced(held, DIGIT_ROWS))
    synthesis = replace(synthesis, packing=fit_packing(k), _constants={})
    for _ in range(DIGIT_ROUNDS):
        # Digits are narrow, and keeping within them costs a little.
        synthesis = _rescaled(synthesis, _change(_mean_errors(synthesis, policy, probe), policy))
    return LinearCodec(synthesis, policy, "svd" if head is None else "head")


def _rescaled(synthesis: LinearDecoder, factor: float) -> LinearDecoder:
    step = (synthesis.step * factor).astype(np.float32)
    return replace(synthesis, step=step, spread=(synthesis.spread / factor).astype(np.float32), _constants={})


def _spaced(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), count)).astype(np.int64)]


def _basis(rows: np.ndarray, policy: LinearSettings, head: tuple[np.ndarray, np.ndarray] | None) -> Basis:
    shift_free = policy.metric == "kl"
    centred = rows.astype(np.float64)
    if shift_free:
        centred -= centred.mean(1, keepdims=True)
    if head is not None:
        basis = head_basis(*head, centred, shift_free=shift_free)
    else:
        basis = principal_basis(centred, shift_free=shift_free, max_rank=MAX_RANK)
    if len(basis.rows):
        return basis
    # One class, or a teacher that always says the same: a direction that is never used.
    return Basis(np.full((1, rows.shape[1]), rows.shape[1] ** -0.5), basis.offset, np.zeros(1))


def _first_step(probe: np.ndarray, basis: Basis, policy: LinearSettings) -> float:
    """The step at which white noise would use up the bound."""
    if policy.metric == "kl":
        noise = 4.0 * policy.fidelity * probe.shape[1]
    else:
        noise = policy.fidelity**2 * float((probe.astype(np.float64) ** 2).sum(1).mean())
    return float(np.clip(np.sqrt(12.0 * noise / len(basis.rows)), 1e-20, 1e20))


def _synthesis(basis: Basis, step: float, policy: LinearSettings, held: np.ndarray) -> LinearDecoder:
    """Without digits yet: every coefficient escapes."""
    rank = len(basis.rows)
    integers, scale = quantize(basis, step * (BASIS_NOISE * rank / 12.0) ** 0.5)
    steps = np.full(rank, step * 2.0 ** (START_LEVEL / LEVELS_PER_OCTAVE), np.float32)
    offset = basis.offset.astype(np.float32)
    bare = LinearDecoder(integers, scale, steps, offset, np.ones(rank, np.float32), Packing.empty(rank))
    x, _ = Trials(bare, policy, Space()).project(held)
    return replace(bare, spread=np.abs(x).mean(0).astype(np.float32), _constants={})


def _mean_errors(synthesis: LinearDecoder, policy: LinearSettings, probe: np.ndarray) -> dict[str, float]:
    """Of the pilot at its starting levels; a row that is far off does not decide."""
    measure = Trials(synthesis, policy, Space())
    x, _ = measure.project(probe)
    attempt = measure.attempt(probe, x, measure.start_levels(probe), np.arange(len(probe)))
    return {name: float(np.minimum(e, 100 * policy.fidelity).mean()) for name, e in attempt.errors.items()}


def _change(means: dict[str, float], policy: LinearSettings) -> float:
    """By what factor the step should change for the errors to be where they are wanted."""
    aim = AIM_OF_CERTIFIED if policy.certified else AIM_OF_MEAN
    power = 0.5 if policy.metric == "kl" else 1.0
    return float(np.clip((aim * policy.fidelity / max(*means.values(), 1e-30)) ** power, 0.05, 20.0))


def _balanced(means: dict[str, float], policy: LinearSettings) -> LinearSettings:
    """Errors at T = 1 weigh more where it is they that use up the bound."""
    if policy.metric != "kl" or policy.certified:
        return policy
    excess = np.clip(means["kl_t1"] / max(means["kl_t4"], 1e-30), 0.25, 4.0) ** 0.7
    return replace(policy, weight=float(np.clip(policy.weight * excess, LEAST_WEIGHT, MOST_WEIGHT)))
