"""The generator as FORMAT.md specifies it, in plain Python: the same integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from redistill.views import draw_params, parse_recipe
from redistill.views.canaries import canary_rows
from redistill.views.ops import BINS, OPERATIONS, rand_magnitudes, wide_magnitudes

SEED, VIEW, N = 0xFEDCBA9876543210, 6, 400
SIZES = np.random.default_rng(8).integers(30, 700, (N, 2))
SIGNED = range(1, 10)


def words(row: int, purpose: int, index: int = 0) -> list[int]:
    c, k = [row, VIEW, purpose, index], [SEED % 2**32, SEED // 2**32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q // 2**32 ^ c[1] ^ k[0], q % 2**32, p // 2**32 ^ c[3] ^ k[1], p % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def below(word: int, n: int) -> int:
    return word * n // 2**32


def happens(word: int, p: float) -> bool:
    return word < round(p * 2**32)


def between(word: int, a: float, b: float) -> float:
    return a + (b - a) * word / 2**32


def box(w: list[int], height: int, width: int, scale: tuple, ratio: tuple) -> list[int]:
    area = height * width * between(w[0], *scale)
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** ((w[1] // 2**16 + 0.5) / 65536)
    wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    return [below(w[2], max(height - high + 1, 1)), below(w[3], max(width - wide + 1, 1)), high, wide]


def crop(row: int, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)) -> list[int]:
    height, width = SIZES[row].tolist()
    for attempt in range(10):
        candidate = box(words(row, 1, attempt), height, width, scale, ratio)
        if 1 <= candidate[2] <= height and 1 <= candidate[3] <= width:
            return candidate
    high = round(width / ratio[0]) if width / height < ratio[0] else height
    wide = round(height * ratio[1]) if width / height > ratio[1] else width
    return [(height - high) // 2, (width - wide) // 2, high, wide]


def erase(row: int, side: int, p: float) -> list[int]:
    if not happens(words(row, 7)[0], p):
        return [0, 0, 0, 0]
    for attempt in range(1, 11):
        top, left, high, wide = box(words(row, 7, attempt), side, side, (0.02, 0.33), (1 / 3.3, 1 / 0.3))
        if high < side and wide < side:
            return [round(edge * 2**15 / side) for edge in (top, left, top + high, left + wide)]
    return [0, 0, 0, 0]


def jitter(row: int, strengths: tuple, p: float) -> list[int]:
    first, second = words(row, 3, 0), words(row, 3, 1)
    order = below(first[1], 24) if happens(first[0], p) else -1
    factors = [between(w, 1 - s, 1 + s) for w, s in zip((*first[2:], second[0]), strengths[:3], strict=True)]
    return [order, *(round(x * 2**13) for x in (*factors, between(second[1], -strengths[3], strengths[3])))]


def operations(row: int, count: int, magnitude: int | None) -> list[list[int]]:
    table = rand_magnitudes(224) if magnitude is not None else wide_magnitudes(224)
    drawn = []
    for k in range(count):
        w = words(row, 4, k)
        number = below(w[0], len(OPERATIONS))
        stored = int(table[number, below(w[2], BINS) if magnitude is None else magnitude])
        drawn.append([number, -stored if number in SIGNED and happens(w[1], 0.5) else stored])
    return drawn


def mix(row: int, side: int, mixup: float, cutmix: float, p: float, switch: float) -> tuple:
    w, second = words(row, 8, 0), words(row, 8, 1)
    partner = below(w[0], N - 1)
    partner += partner >= row
    if not happens(w[1], p):
        return row, 65535, [0, 0, 0, 0]
    cut = happens(w[2], switch)
    chance = (w[3] // 2**16 + 0.5) / 65536
    alpha = cutmix if cut else mixup
    weight, edges = round(scipy.stats.beta(alpha, alpha).ppf(chance) * 65535), [0, 0, 0, 0]
    if cut:
        half = int(0.5 * math.sqrt(1 - weight / 65535) * side)
        x, y = below(second[0], side), below(second[1], side)
        edges = [min(max(edge, 0), side) for edge in (y - half, x - half, y + half, x + half)]
        area = (edges[2] - edges[0]) * (edges[3] - edges[1])
        weight, edges = round((1 - area / side**2) * 65535), edges if area else [0, 0, 0, 0]
    return (partner if weight < 65535 else row), weight, [round(edge * 2**15 / side) for edge in edges]


@pytest.fixture(scope="module")
def drawn() -> dict[str, list]:
    text = (
        "rrc?vflip=0.25&color_jitter=0.4,0.3,0.2,0.1&color_jitter_prob=0.8&aa=rand-m9-n2&grayscale_prob=0.2"
        "&gaussian_blur_prob=0.5&blur_sigma=0.2,1.7&reprob=0.6"
        "&mixup=0.3&cutmix=1.5&mixup_prob=0.8&mixup_switch_prob=0.4"
    )
    params = draw_params(parse_recipe(text), SEED, VIEW, np.arange(N), SIZES, N)
    return {name: values.tolist() for name, values in params.items()}


def test_crop(drawn):
    assert drawn["crop"] == [crop(row) for row in range(N)]


def test_flip(drawn):
    for row, bits in enumerate(drawn["flip"]):
        w = words(row, 2)
        assert bits == happens(w[0], 0.5) + 2 * happens(w[1], 0.25)


def test_jitter(drawn):
    assert drawn["jitter"] == [jitter(row, (0.4, 0.3, 0.2, 0.1), 0.8) for row in range(N)]


def test_operations(drawn):
    assert drawn["ops"] == [operations(row, 2, 9) for row in range(N)]
    wide = draw_params(parse_recipe("rrc?aa=ta_wide"), SEED, VIEW, np.arange(N), SIZES, N)["ops"]
    assert wide.tolist() == [operations(row, 1, None) for row in range(N)]


def test_gray_blur_and_erase(drawn):
    for row in range(N):
        w = words(row, 6)
        assert drawn["gray"][row] == happens(words(row, 5)[0], 0.2)
        assert drawn["blur"][row] == (round(between(w[1], 0.2, 1.7) * 2**12) if happens(w[0], 0.5) else 0)
        assert drawn["erase"][row] == erase(row, 224, 0.6)


def test_mix(drawn):
    for row in range(N):
        values = drawn["mix_partner"][row], drawn["mix_weight"][row], drawn["mix_box"][row]
        assert values == mix(row, 224, 0.3, 1.5, 0.8, 0.4)


def test_padded_crop():
    values = draw_params(parse_recipe("cifar?padding=5&size=30"), SEED, VIEW, np.arange(N), SIZES, N)["crop"]
    for row in range(N):
        w, (height, width) = words(row, 1), SIZES[row].tolist()
        assert values[row].tolist() == [below(w[0], height + 11 - 30) - 5, below(w[1], width + 11 - 30) - 5, 30, 30]


def test_canaries():
    rows = list(range(N))
    for k in range(64):
        step = below(words(k, 9)[0], N - k)
        rows[k], rows[k + step] = rows[k + step], rows[k]
    assert canary_rows(SEED, VIEW, N).tolist() == sorted(rows[:64])
