"""The random generator against published test vectors and a slow second implementation; its properties."""

from __future__ import annotations

import numpy as np
import pytest

from redistill.views.counter import Purpose, below, draw_words, happens, philox4x32, uniform

# Random123's known-answer tests of "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimals(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    first, second = hexadecimals(key)
    words = philox4x32(np.array(hexadecimals(counter), np.uint64)[:, None], (first, second))
    assert words[:, 0].tolist() == hexadecimals(output)


def slow_philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """The paper's definition in Python integers, one counter at a time."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (product1 >> 32) ^ c[1] ^ k[0],
            product1 % 2**32,
            (product0 >> 32) ^ c[3] ^ k[1],
            product0 % 2**32,
        ]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_agrees_with_a_slow_second_implementation():
    counters = np.random.default_rng(5).integers(0, 2**32, (4, 300), dtype=np.uint64)
    before = counters.copy()
    words = philox4x32(counters, (0xDEADBEEF, 7))
    assert (counters == before).all()
    for n in range(300):
        assert words[:, n].tolist() == slow_philox(counters[:, n].tolist(), (0xDEADBEEF, 7))


def test_words_follow_the_layout_of_the_format():
    seed = 0x0123456789ABCDEF
    words = draw_words(seed, 3, np.array([41, 2**32 - 1]), Purpose.MIX, 2)
    assert words[:, 0].tolist() == slow_philox([41, 3, 8, 2], (0x89ABCDEF, 0x01234567))
    assert words[:, 1].tolist() == slow_philox([2**32 - 1, 3, 8, 2], (0x89ABCDEF, 0x01234567))


def test_words_do_not_depend_on_the_other_rows():
    rows = np.random.default_rng(0).permutation(1000)
    together = draw_words(1, 2, rows, Purpose.CROP)
    assert (draw_words(1, 2, rows[100:103], Purpose.CROP) == together[:, 100:103]).all()


@pytest.mark.parametrize(
    "other", [(2, 0, Purpose.CROP, 0), (1, 1, Purpose.CROP, 0), (1, 0, Purpose.FLIP, 0), (1, 0, Purpose.CROP, 1)]
)
def test_seed_view_purpose_and_index_all_matter(other):
    rows = np.arange(500)
    same = draw_words(1, 0, rows, Purpose.CROP, 0) == draw_words(other[0], other[1], rows, *other[2:])
    assert same.sum() <= 2  # two of 2000 words of 32 bits agree by chance once in ten million tries


def test_bounded_numbers_reach_both_ends_and_no_further():
    words = np.array([0, 2**31 - 1, 2**31, 2**32 - 1], np.uint64)
    assert below(words, 2).tolist() == [0, 0, 1, 1]
    assert below(words, 7).tolist() == [0, 3, 3, 6]
    assert below(words, 2**32).tolist() == words.tolist()
    assert below(words, [1, 2, 3, 4]).tolist() == [0, 0, 1, 3]
    assert uniform(words).max() < 1.0
    assert not happens(words, 0.0).any()
    assert happens(words, 1.0).all()
    assert happens(words, 0.5).tolist() == [True, True, False, False]
