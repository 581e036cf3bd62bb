"""Designing a packing from the coefficients of a pilot: which digits, in which bytes, in which order."""

from __future__ import annotations

import numpy as np

from redistill_cache.codecs.packing import Packing

__all__ = ["fit_packing"]

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
    bytes_ = _balanced(slots)
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


def _balanced(slots: list[_Slot]) -> list[list[_Slot]]:
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
