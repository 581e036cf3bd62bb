"""Random words that are a function of (seed, view, row, purpose, index) and of nothing else: Philox4x32-10.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Integer arithmetic throughout, so
every platform draws the same words; no state is carried from one row to the next, so order, batches, ranks and restarts
cannot matter. FORMAT.md specifies the layout of the counter.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

__all__ = ["Purpose", "below", "draw_words", "happens", "philox4x32", "uniform"]

Words = npt.NDArray[np.uint64]  # 32-bit words, held in 64 bits so that products fit

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
ROUNDS = 10


class Purpose(IntEnum):
    """The third word of the counter: what the draw is for. Numbers are part of the format and never reused."""

    CROP = 1
    FLIP = 2
    JITTER = 3
    OPS = 4
    GRAY = 5
    BLUR = 6
    ERASE = 7
    MIX = 8
    CANARY = 9


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds over counters [4, n]; returns the four output words of each, [4, n], in a new array."""
    c0, c1, c2, c3 = (word.copy() for word in counter)
    k0, k1 = key
    low0, low1 = np.empty_like(c0), np.empty_like(c0)
    for _ in range(ROUNDS):
        np.multiply(c0, MULTIPLIERS[0], out=c0)  # the 64-bit products of the round
        np.multiply(c2, MULTIPLIERS[1], out=c2)
        np.bitwise_and(c0, LOW, out=low0)
        np.bitwise_and(c2, LOW, out=low1)
        np.right_shift(c0, HALF, out=c0)
        np.right_shift(c2, HALF, out=c2)
        c2 ^= c1
        c2 ^= np.uint64(k0)
        c0 ^= c3
        c0 ^= np.uint64(k1)
        # New counter: (high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0); the old buffers are reused for the next lows.
        c0, c1, c2, c3, low0, low1 = c2, low1, c0, low0, c1, c3
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def draw_words(seed: int, view: int, rows: npt.NDArray[np.integer], purpose: Purpose, index: int = 0) -> Words:
    """Four random 32-bit words for each row, [4, n]: counter (row, view, purpose, index); the key is the seed."""
    counter = np.empty((4, len(rows)), np.uint64)
    counter[0] = rows
    counter[1:] = np.array([[view], [purpose], [index]], np.uint64)
    return philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))


def below(words: Words, bound: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Integers in [0, bound): floor(word * bound / 2**32), exact for bounds up to 2**32; bias at most bound / 2**32."""
    return ((words * np.asarray(bound, np.uint64)) >> HALF).astype(np.int64)


def uniform(words: Words) -> npt.NDArray[np.float64]:
    """The words as fractions in [0, 1), exactly word / 2**32."""
    return words.astype(np.float64) * 2.0**-32


def happens(words: Words, probability: float) -> npt.NDArray[np.bool_]:
    """True with the given probability, to the nearest 2**-32."""
    return words < np.uint64(round(probability * 2.0**32))
