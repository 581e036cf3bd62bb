"""The linear codec: round trips within the bound, packing, statistics and constants; other codecs beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numcodecs import Zstd
from redistill_cache.codecs import BlockStats, NotFinite, fit_codec, kl_rows, linear_fit, open_codec
from redistill_cache.codecs.backend import Backend
from redistill_cache.codecs.catalogue import compressed_size
from redistill_cache.codecs.linear_decode import Packing, packing_flaw
from redistill_cache.codecs.linear_fit import fit_packing


def low_rank(rows: int, width: int, rank: int, scale: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, rank)) * np.exp(-np.arange(rank) / 4) @ rng.normal(size=(rank, width))
    return (scale * values).astype(np.float32)


@pytest.mark.parametrize("name", ["linear", "float16", "float32", "compander"])
@pytest.mark.parametrize("width", [1, 2, 3, 17, 100, 300])
def test_every_row_is_within_the_bound_after_a_round_trip_through_the_archive(name, width):
    rows = low_rank(400, width, min(width, 20), 3.0, seed=width)
    codec = fit_codec(name, rows[:200], fidelity=1e-3)
    encoded = codec.encode(rows)
    reopened = open_codec(name, width, codec.config(), codec.side())
    decoded = reopened.decode(encoded.arrays)
    assert decoded.dtype == np.float32
    assert decoded.shape == rows.shape
    for temperature in (1, 4):
        divergence = kl_rows(rows, decoded, temperature)
        assert divergence.max() <= 1e-3
        # Errors are computed exactly and rounded up; decoding in float32 changes the last digits of small errors.
        np.testing.assert_allclose(divergence, encoded.errors[f"kl_t{temperature}"], rtol=2e-3, atol=5e-7)


@pytest.mark.parametrize("known_head", [True, False])
def test_a_pilot_of_many_classes_is_taken_in_pieces_and_in_part(known_head: bool, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(4)
    weight, bias = rng.normal(size=(60, 8)).astype(np.float32), rng.normal(size=60).astype(np.float32)
    rows = (rng.normal(size=(600, 8)) @ weight.T + bias).astype(np.float32)
    head = (weight, bias) if known_head else None
    whole = fit_codec("linear", rows, head=head)
    monkeypatch.setattr(linear_fit, "PIECE_VALUES", 7 * 60)
    in_pieces = fit_codec("linear", rows, head=head)
    np.testing.assert_array_equal(in_pieces.decoder.integers, whole.decoder.integers)
    np.testing.assert_allclose(in_pieces.decoder.spread, whole.decoder.spread, rtol=1e-6)
    monkeypatch.setattr(linear_fit, "MAX_GRAM", 50)
    of_few = fit_codec("linear", rows, head=head)
    encoded = of_few.encode(rows)
    assert max(float(errors.max()) for errors in encoded.errors.values()) <= 1e-3
    assert compressed_size(of_few, encoded) < 1.1 * compressed_size(whole, whole.encode(rows))


def test_numpy_and_torch_agree():
    rows = low_rank(700, 50, 30, 4.0, seed=1)
    codec = fit_codec("linear", rows[:400])
    encoded = codec.encode(rows)
    on_torch = codec.decode({name: torch.from_numpy(np.array(a)) for name, a in encoded.arrays.items()})
    np.testing.assert_allclose(on_torch.numpy(), codec.decode(encoded.arrays), atol=1e-5)
    from_torch = codec.encode(torch.from_numpy(rows))
    np.testing.assert_array_equal(from_torch.arrays["q"], encoded.arrays["q"])


def test_rows_that_are_not_finite_are_named():
    rows = low_rank(40, 10, 5, 1.0, seed=2)
    codec = fit_codec("linear", rows)
    rows[[3, 17], 4] = np.nan
    rows[20, 0] = np.inf
    with pytest.raises(NotFinite, match="3 rows of the batch") as caught:
        codec.encode(rows)
    assert caught.value.rows == [3, 17, 20]


def test_statistics_add_up():
    rows = low_rank(1000, 30, 20, 4.0, seed=3)
    codec = fit_codec("linear", rows)
    whole = BlockStats.of(codec.encode(rows))
    parts = [
        BlockStats.from_json(BlockStats.of(codec.encode(rows[i : i + 300])).to_json()) for i in range(0, 1000, 300)
    ]
    merged = BlockStats.merge(parts)
    assert merged.summary() == pytest.approx(whole.summary())
    assert merged.rows == 1000
    assert whole.summary()["p99_kl_t1"] >= np.quantile(codec.encode(rows).errors["kl_t1"], 0.99)


def unpacked(packing: Packing, packed: np.ndarray) -> np.ndarray:
    """The coefficients in packed bytes [n, width], without escapes."""
    weights = np.zeros((len(packing.coefficient), packing.rank))
    weights[np.arange(len(weights)), packing.coefficient] = packing.weight
    return packing.digits(Backend(), packed) @ weights[packing.decoded_slots]


def test_every_packing_returns_what_was_packed():
    rng = np.random.default_rng(1)
    for spread in (0.01, 0.5, 3.0, 40.0, 2000.0):
        k = np.rint(rng.normal(size=(500, 40)) * spread * np.exp(-np.arange(40) / 15)).astype(np.int64)
        k[:, 3] = abs(k[:, 3])
        packing = fit_packing(k)
        assert packing_flaw(packing) is None
        within, escape = packing.split(Backend(), k.astype(np.float64))
        assert (within + escape * packing.reach == k).all()
        np.testing.assert_array_equal(unpacked(packing, packing.pack(Backend(), within)), within)
        assert (escape != 0).mean() < 0.05
    assert packing_flaw(Packing.empty(3)) is None


def test_bytes_of_eight_slots_and_the_largest_digits_are_unpacked():
    rng = np.random.default_rng(2)
    radix = np.array([2] * 8 + [256] + [16, 16] + [3, 5, 7, 2], np.uint16)
    byte = np.array([0] * 8 + [1] + [2, 2] + [3] * 4, np.uint16)
    low = np.where(np.arange(15) % 2, -32768, 32767).astype(np.int16)
    symbols = np.stack([rng.permutation(256).astype(np.uint8) for _ in range(4)])
    packing = Packing(15, np.arange(15, dtype=np.uint16), radix, low, byte, symbols)
    assert packing_flaw(packing) is None
    k = low + rng.integers(0, radix, (50, 15))
    np.testing.assert_array_equal(unpacked(packing, packing.pack(Backend(), k.astype(np.float64))), k)


def bits_of_columns(packed: np.ndarray) -> float:
    """The entropy of the bytes of a row, every column coded by itself."""
    counts = (np.bincount(column, minlength=256) for column in packed.T)
    shares = (count[count > 0] / len(packed) for count in counts)
    return float(sum(-(share * np.log2(share)).sum() for share in shares))


def test_wide_coefficients_take_no_more_than_their_entropy():
    deviations = np.array([80.0, 120.0, 200.0, 700.0])
    k = np.rint(np.random.default_rng(0).normal(size=(100_000, 4)) * deviations).astype(np.int64)
    packing = fit_packing(k)
    within, _ = packing.split(Backend(), k.astype(np.float64))
    entropy = np.log2(deviations * np.sqrt(2 * np.pi * np.e)).sum()
    assert bits_of_columns(packing.pack(Backend(), within)) < entropy + 0.1


def test_zstd_compresses_the_bytes_of_a_chunk_to_nearly_their_entropy():
    rng = np.random.default_rng(0)
    sizes = 80.0 / np.arange(1, 200) ** 0.8  # from wide digits to several in a byte
    k = np.rint(rng.laplace(size=(2048, len(sizes))) * sizes).astype(np.int64)
    packing = fit_packing(k)
    within, _ = packing.split(Backend(), k.astype(np.float64))
    columns = np.ascontiguousarray(packing.pack(Backend(), within).T)
    entropy = bits_of_columns(columns.T) / 8 * columns.shape[1]
    assert len(Zstd(19).encode(columns)) < 1.045 * entropy


def test_a_decoder_with_another_step_does_not_reuse_cached_constants():
    rows = low_rank(200, 20, 10, 3.0, seed=4)
    codec = fit_codec("linear", rows)
    arrays = codec.encode(rows).arrays
    centred = codec.decode(arrays) - codec.decoder.offset
    doubled = replace(codec.decoder, step=2 * codec.decoder.step)
    np.testing.assert_allclose(doubled.decode(arrays) - codec.decoder.offset, 2 * centred, rtol=1e-4, atol=1e-4)
