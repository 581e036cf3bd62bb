"""The certified bound for random shapes, scales and ranks, and for adversarial rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from redistill_cache.codecs import fit_codec, join_encoded, kl_rows, open_codec
from redistill_cache.codecs.catalogue import compressed_size

# Arrays drawn from a seed do not shrink to anything simpler.
PROFILE = settings(deadline=None, phases=[Phase.explicit, Phase.generate], database=None)
FIDELITIES = (1e-2, 1e-3, 1e-5)


@st.composite
def teachers(draw):
    """(pilot, rows): the first outputs of a teacher, and later outputs followed by adversarial rows."""
    width = draw(st.integers(2, 40) | st.just(100))
    rank = draw(st.integers(1, min(width, 40)))
    scale = 10.0 ** draw(st.integers(-3, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mixing = (
        rng.normal(size=(rank, width)) * np.exp(-np.arange(rank) / draw(st.sampled_from([1.0, 10.0, 1e6])))[:, None]
    )
    offset = draw(st.sampled_from([0.0, 1e4])) + rng.normal(size=width)
    pilot = rng.normal(size=(draw(st.integers(1, 80)), rank)) @ mixing * scale + offset
    later = rng.normal(size=(draw(st.integers(1, 40)), rank)) @ mixing * scale + offset
    return pilot.astype(np.float32), np.concatenate([later, adversarial_rows(pilot, rng)]).astype(np.float32)


def adversarial_rows(pilot: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    width = pilot.shape[1]
    centred = pilot - pilot.mean(0)
    direction = rng.normal(size=width)
    span = np.linalg.svd(centred, full_matrices=False)[2][: min(len(pilot), width) - 1]
    one_hot = np.zeros(width)
    one_hot[rng.integers(width)] = 1.0
    return np.stack(
        [
            np.zeros(width),
            np.full(width, -3e4),
            10.0 * one_hot,
            1e4 * one_hot,
            -1e4 * one_hot,
            3e38 * one_hot,
            1e-30 * direction,
            100.0 * direction,
            10.0 * (direction - span.T @ (span @ direction)),  # orthogonal to the pilot
            np.linspace(-1e4, 1e4, width),
            pilot[0] + 1e-3 * direction,
        ]
    )


@pytest.mark.parametrize("rounding", ["plain", "shaped"])
@given(teacher=teachers(), fidelity=st.sampled_from(FIDELITIES), keep_shift=st.booleans())
@settings(PROFILE, max_examples=6, suppress_health_check=[HealthCheck.too_slow])
def test_linear_meets_the_bound_in_every_row(rounding, teacher, fidelity, keep_shift):
    pilot, rows = teacher
    codec = fit_codec("linear", pilot, fidelity=fidelity, rounding=rounding, keep_shift=keep_shift)
    check_certificate(codec, rows, fidelity)


@pytest.mark.parametrize("name", ["float16", "compander"])
@given(teacher=teachers(), fidelity=st.sampled_from(FIDELITIES))
@settings(PROFILE, max_examples=15)
def test_the_simple_codecs_meet_the_bound_in_every_row(name, teacher, fidelity):
    pilot, rows = teacher
    check_certificate(fit_codec(name, pilot, fidelity=fidelity), rows, fidelity)


def check_certificate(codec, rows, fidelity):
    encoded = codec.encode(rows)
    reopened = open_codec(codec.name, codec.width, codec.config(), codec.side())
    decoded = reopened.decode(encoded.arrays)
    for temperature in (1, 4):
        assert (kl_rows(rows, decoded, temperature) <= fidelity).all()
        assert (encoded.errors[f"kl_t{temperature}"] <= fidelity).all()
    np.testing.assert_array_equal(decoded[encoded.exact], rows[encoded.exact])
    needed = reopened.rows_needing(encoded.arrays)
    compact = {name: array[needed[name]] if name in needed else array for name, array in encoded.arrays.items()}
    np.testing.assert_array_equal(reopened.decode(compact), decoded)
    return encoded


@given(seed=st.integers(0, 1000), fidelity=st.sampled_from([1e-1, 1e-2, 1e-4]))
@settings(PROFILE, max_examples=10)
def test_features_meet_the_bound_on_the_relative_error(seed, fidelity):
    rng = np.random.default_rng(seed)
    rows = np.maximum(rng.normal(size=(120, 12)) @ rng.normal(size=(12, 40)), 0) * rng.exponential(size=(120, 1))
    rows = np.concatenate([rows, np.zeros((1, 40)), 1e6 * rng.normal(size=(2, 40))]).astype(np.float32)
    codec = fit_codec("linear", rows[:80], metric="relative", fidelity=fidelity)
    encoded = codec.encode(rows)
    error = np.linalg.norm(codec.decode(encoded.arrays).astype(np.float64) - rows, axis=1)
    assert (
        error <= fidelity * np.linalg.norm(rows.astype(np.float64), axis=1) + (np.abs(rows).sum(1) == 0) * fidelity
    ).all()
    assert encoded.errors["relative"].max() <= fidelity


def test_uncertified_rows_meet_the_bound_on_average_and_tenfold_in_every_row():
    rng = np.random.default_rng(5)
    rows = (rng.normal(size=(3000, 12)) @ rng.normal(size=(12, 40))).astype(np.float32)
    codec = fit_codec("linear", rows[:1500], certified=False)
    encoded = codec.encode(rows[1500:])
    assert max(errors.mean() for errors in encoded.errors.values()) <= 1e-3
    assert max(errors.max() for errors in encoded.errors.values()) <= 1e-2


def test_shaped_rounding_takes_fewer_bytes_at_the_same_fidelity():
    rng = np.random.default_rng(6)
    rows = (6 * rng.normal(size=(1500, 30)) @ rng.normal(size=(30, 60)) / 6).astype(np.float32)
    size = {}
    for rounding in ("plain", "shaped"):
        codec = fit_codec("linear", rows[:800], certified=False, rounding=rounding)
        encoded = codec.encode(rows[800:])
        size[rounding] = compressed_size(codec, encoded)
        assert max(errors.mean() for errors in encoded.errors.values()) > 5e-4
    assert size["shaped"] < 0.85 * size["plain"]


@pytest.mark.parametrize("size", [3e3, 1e6])
def test_few_rows_of_a_saturated_teacher_are_stored_exactly(size: float):
    rng = np.random.default_rng(0)
    rows = (size * rng.normal(size=(400, 20)) @ rng.normal(size=(20, 8))).astype(np.float32)
    codec = fit_codec("linear", rows[:200])
    encoded = codec.encode(rows[200:])
    assert encoded.exact.mean() < 0.05
    # One row in thirty needs a fine step; the others, of three bits or so, do not pay for it.
    assert compressed_size(codec, encoded) < 12


def test_the_head_is_used_as_basis():
    rng = np.random.default_rng(8)
    weight, bias = rng.normal(size=(200, 16)), rng.normal(size=200)
    features = np.maximum(rng.normal(size=(600, 16)), 0)
    rows = (features @ weight.T + bias).astype(np.float32)
    codec = fit_codec("linear", rows[:300], head=(weight, bias))
    encoded = codec.encode(rows)
    assert codec.config()["basis"] == "head"
    assert codec.config()["rank"] == 16
    assert not encoded.exact.any()
    assert encoded.errors["kl_t1"].max() <= 1e-3


def test_twenty_one_thousand_classes():
    rng = np.random.default_rng(9)
    rows = (rng.normal(size=(48, 8)) @ rng.normal(size=(8, 21843))).astype(np.float32)
    codec = fit_codec("linear", rows[:40])
    later = np.concatenate([rows[40:], rng.normal(size=(2, 21843)).astype(np.float32)])
    assert check_certificate(codec, later, 1e-3).exact.sum() == 2


def test_joined_batches_equal_one_large_batch():
    rng = np.random.default_rng(10)
    rows = (rng.normal(size=(500, 8)) @ rng.normal(size=(8, 30))).astype(np.float32)
    codec = fit_codec("linear", rows[:300])
    rows[77] = 1e30 * rng.normal(size=30)  # stored exactly
    whole = codec.encode(rows)
    joined = join_encoded([codec.encode(rows[i : i + 60]) for i in range(0, 500, 60)])
    assert whole.exact.sum() == 1
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(joined.arrays[name], array)
    for name, values in whole.errors.items():
        np.testing.assert_array_equal(joined.errors[name], values)
