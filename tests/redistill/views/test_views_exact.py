"""The tables of log-uniform and beta quantiles against scipy, and pinned to the bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import scipy.stats

from redistill.views.exact import ENTRIES, beta_weights, log_uniform, power
from redistill.views.recipe import WEIGHT_UNIT

CHANCES = (np.arange(ENTRIES) + 0.5) / ENTRIES


@pytest.mark.parametrize("exponent", [0.0, 0.1, 0.5, 0.9999999999, 1.0, 3.7, 16.0])
def test_power(exponent):
    base = np.linspace(0.001, 2.0, 1000)
    np.testing.assert_allclose(power(base, exponent), base**exponent, rtol=1e-6)


@pytest.mark.parametrize(("low", "high"), [(3 / 4, 4 / 3), (0.3, 3.3), (1.0, 1.0), (1e-3, 1e3)])
def test_log_uniform_quantiles(low, high):
    np.testing.assert_allclose(log_uniform(low, high), low * (high / low) ** CHANCES, rtol=1e-13)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 0.8, 1.0, 1.5, 2.0, 8.0, 16.0])
def test_beta_quantiles_are_the_nearest_weights(alpha):
    expected = scipy.stats.beta(alpha, alpha).ppf(CHANCES) * WEIGHT_UNIT
    assert np.abs(beta_weights(alpha) - expected).max() <= 0.51


def test_tables_are_the_same_bits_everywhere():
    """Computed on x86-64; the operations used are correctly rounded on every IEEE-754 platform."""
    ratios = hashlib.sha256(log_uniform(3 / 4, 4 / 3).astype("<f8").tobytes()).hexdigest()
    weights = hashlib.sha256(beta_weights(0.2).astype("<u2").tobytes()).hexdigest()
    assert (ratios[:16], weights[:16]) == ("e6d784f0e9a7f535", "ab0881c1719b7432")
