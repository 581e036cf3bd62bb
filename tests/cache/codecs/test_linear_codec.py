"""The linear codec: what it promises of every row, whatever the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from redistill_cache.codecs import BlockStats, NotFinite, fit_codec, kl_rows, open_codec


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
    for temperature, reported in ((1, encoded.kl_t1), (4, encoded.kl_t4)):
        lost = kl_rows(rows, decoded, temperature)
        assert lost.max() <= 1e-3
        # Reported by exact arithmetic, rounded up; decoded in float32, whose last digits show in small losses.
        np.testing.assert_allclose(lost, reported, rtol=2e-3, atol=5e-7)


def test_numpy_and_torch_agree():
    rows = low_rank(700, 50, 30, 4.0, seed=1)
    codec = fit_codec("linear", rows[:400])
    encoded = codec.encode(rows)
    on_torch = codec.decode({name: torch.from_numpy(np.array(a)) for name, a in encoded.arrays.items()})
    np.testing.assert_allclose(on_torch.numpy(), codec.decode(encoded.arrays), atol=1e-5)
    from_torch = codec.encode(torch.from_numpy(rows))
    assert isinstance(from_torch.arrays["q"], torch.Tensor)
    np.testing.assert_array_equal(from_torch.arrays["q"].numpy(), encoded.arrays["q"])


def test_rows_that_are_not_finite_are_named():
    rows = low_rank(40, 10, 5, 1.0, seed=2)
    codec = fit_codec("linear", rows)
    rows[[3, 17], 4] = np.nan
    rows[20, 0] = np.inf
    with pytest.raises(NotFinite, match="3 of the rows") as caught:
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
    assert whole.summary()["p99_kl_t1"] >= np.quantile(codec.encode(rows).kl_t1, 0.99)
