"""Features: the error of every row is bounded relative to its distance from the mean row.

The rows are decoded here by the formula of FORMAT.md in float64, from the stored arrays, without the library's decoder.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from redistill_cache.codecs import CodecOptions, explain_codec, fit_codec, open_codec
from redistill_cache.codecs.backend import Backend
from redistill_cache.codecs.device_search import encode_on_device
from redistill_cache.codecs.linear_encode import Quantizer
from redistill_cache.codecs.stats import BlockStats, check_stats
from redistill_cache.errors import Damaged
from redistill_cache.spec import SignalSpec, TeacherSpec


def decoded_by_the_format(side, arrays) -> np.ndarray:
    """rows = (k * step * 2^(-(level & 63)/8)) @ basis + offset, float64; rows stored exactly as they are."""
    basis = 256.0 * side["basis_high"].astype(np.float64) + side["basis_low"]
    basis *= side["scale"].astype(np.float64)[:, None]
    level, radix = arrays["level"].astype(int), side["slot_radix"].astype(int)
    k = np.zeros((len(level), len(basis)))
    reach = np.ones(len(basis))
    number_of_byte: dict[int, np.ndarray] = {}
    for slot, (c, byte) in enumerate(zip(side["slot_coefficient"], side["slot_byte"], strict=True)):
        number = number_of_byte.setdefault(byte, side["symbols"][byte][arrays["q"][:, byte]].astype(int))
        k[:, c] += reach[c] * (int(side["slot_low"][slot]) + number % radix[slot])
        number_of_byte[byte] = number // radix[slot]
        reach[c] *= radix[slot]
    escaped = (level & 64) != 0
    k[escaped] += np.asarray(arrays["escape"])[escaped] * reach
    steps = side["step"].astype(np.float64) * 2.0 ** (-(level & 63)[:, None] / 8)
    rows = (k * steps) @ basis + side["offset"]
    exact = (level & 128) != 0
    rows[exact] = np.asarray(arrays["exact"])[exact]
    return rows


def features(seed: int, count: int = 400, width: int = 48) -> np.ndarray:
    """Rectified, correlated, far from zero in the mean, of very different lengths; with rows at and near the mean."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, 12)) * 0.8 ** np.arange(12) @ rng.normal(size=(12, width))
    rows = np.maximum(rows + 3.0 + 0.1 * rng.normal(size=(count, width)), 0) * rng.exponential(1, (count, 1))
    rows[1] = rows[: count // 2].mean(0)
    rows[2] = rows[1] + 1e-5 * rng.normal(size=width)
    rows[3] = 0
    rows[4] *= 1e4
    return rows.astype(np.float32)


@given(seed=st.integers(0, 10_000), fidelity=st.sampled_from([0.4, 0.1, 0.02, 1e-4]))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_every_row_keeps_what_the_format_promises(seed: int, fidelity: float):
    rows = features(seed)
    codec = fit_codec("linear", rows[:250], metric="centred", fidelity=fidelity)
    encoded, side, config = codec.encode(rows), codec.side(), codec.config()
    exact, mean = rows.astype(np.float64), side["offset"].astype(np.float64)
    decoded = decoded_by_the_format(side, encoded.arrays)
    distance = np.linalg.norm(exact - mean, axis=1)
    assert config["floor"] == pytest.approx(0.1 * np.median(distance[:250]), rel=1e-6)
    error = np.linalg.norm(decoded - exact, axis=1)
    size = np.maximum(distance, config["floor"])
    slack = 1 + 1e-4  # the reader's rows are float32
    assert (error <= slack * fidelity * size).all()
    assert (encoded.errors["centred"] * slack >= error / size - 1e-6).all()
    assert encoded.errors["centred"].max() <= fidelity
    # What follows from it: the angle at the mean, distances of two rows, and the gradient of the mean squared error.
    far = distance > config["floor"]
    cosine = ((decoded - mean) * (exact - mean)).sum(1)[far] / (np.linalg.norm(decoded - mean, axis=1) * distance)[far]
    assert (cosine >= math.sqrt(1 - fidelity**2) - 1e-6).all()
    one, other = np.arange(len(rows)), np.roll(np.arange(len(rows)), 7)
    change = np.abs(
        np.linalg.norm(decoded[one] - decoded[other], axis=1) - np.linalg.norm(exact[one] - exact[other], axis=1)
    )
    assert (change <= slack * fidelity * (size[one] + size[other])).all()
    student = np.random.default_rng(seed).normal(size=rows.shape)
    gradient = np.linalg.norm(2 / rows.shape[1] * ((student - decoded) - (student - exact)), axis=1)
    assert (gradient <= slack * 2 * fidelity * size / rows.shape[1]).all()
    reopened = open_codec("linear", rows.shape[1], config, side)
    np.testing.assert_allclose(reopened.decode(encoded.arrays), decoded, atol=1e-5 * np.abs(rows).max())
    np.testing.assert_allclose(
        reopened.errors(rows, np.asarray(reopened.decode(encoded.arrays)))["centred"], error / size, atol=1e-4
    )


def test_a_mean_far_from_zero_does_not_loosen_the_bound():
    """An error of a tenth of the row, far from zero, would be larger than what differs between rows."""
    rows = (np.random.default_rng(3).normal(size=(400, 48)) + 50).astype(np.float32)
    stored = {
        metric: np.asarray(codec.decode(codec.encode(rows).arrays))
        for metric in ("relative", "centred")
        for codec in [fit_codec("linear", rows, metric=metric, fidelity=0.1)]
    }
    distance = np.linalg.norm(rows - rows.mean(0), axis=1)
    error = {metric: np.median(np.linalg.norm(values - rows, axis=1) / distance) for metric, values in stored.items()}
    assert error["relative"] > 0.3
    assert error["centred"] < 0.1


def test_rounding_counts_the_bits_of_features():
    """Fewer bytes than with rounding to the nearest, at the same bound in every row."""
    rng = np.random.default_rng(0)
    rows = (rng.laplace(size=(3000, 64)) * 0.85 ** np.arange(64)) @ np.linalg.qr(rng.normal(size=(64, 64)))[0]
    choice = explain_codec("auto", rows.astype(np.float32), CodecOptions(fidelity=0.2, metric="centred"))
    codec = choice.codec
    k = np.sort(np.abs(np.asarray(codec.encode(rows.astype(np.float32)).arrays["q"])), axis=None)
    assert codec.name == "linear"
    assert len(k)
    assert choice.best.bytes_per_row < 9.4  # 10.3 with rounding to the nearest


def test_constant_features_are_stored():
    rows = np.full((300, 7), 0.1, np.float32)
    codec = fit_codec("auto", rows, metric="centred", fidelity=0.1)
    np.testing.assert_allclose(codec.decode(codec.encode(rows).arrays), rows, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 33, 100])
def test_numpy_and_torch_encode_the_same_bytes(width: int):
    rows = features(width, width=width)
    codec = fit_codec("linear", rows[:250], metric="centred", fidelity=0.1)
    on_torch = Quantizer(codec.decoder, codec.settings, Backend(torch, torch.device("cpu")))
    found, expected = encode_on_device(on_torch, torch.from_numpy(rows), codec.encode), codec.encode(rows)
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(np.asarray(found.arrays[name]), np.asarray(array), err_msg=name)


def test_the_specification_with_the_new_measure_has_the_new_version():
    rows = features(1)
    signals = {
        metric: SignalSpec.of("layer3", fit_codec("linear", rows, metric=metric)) for metric in ("relative", "centred")
    }
    versions = {name: TeacherSpec("net", (signal,)).to_json()["version"] for name, signal in signals.items()}
    assert versions == {"relative": "1.0", "centred": "1.1"}
    assert "floor" not in signals["relative"].config


def test_statistics_above_the_bound_are_refused():
    rows = features(2)
    codec = fit_codec("linear", rows, metric="centred", fidelity=0.1)
    teacher = TeacherSpec("net", (SignalSpec.of("layer3", codec),))
    stats = BlockStats.of(codec.encode(rows)).to_json()
    check_stats(teacher, {"layer3": stats}, len(rows))
    stats["errors"]["centred"] = {"sum": 0.2 * len(rows), "max": 0.2, "histogram": [[462, len(rows)]]}
    with pytest.raises(Damaged, match=r"up to the certified bound of 0\.1, found 0\.2"):
        check_stats(teacher, {"layer3": stats}, len(rows))


@pytest.mark.parametrize("floor", [None, 0.0, -1.0, 1e39, "1"])
def test_a_floor_that_no_writer_states_is_refused(floor: object):
    codec = fit_codec("linear", features(4), metric="centred", fidelity=0.1)
    config = {key: value for key, value in codec.config().items() if key != "floor"}
    with pytest.raises(Damaged, match="floor"):
        open_codec("linear", codec.width, config if floor is None else {**config, "floor": floor}, codec.side())
