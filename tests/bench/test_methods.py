"""The statistics of bench/methods.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

from redistill.losses.objective import Objective
from redistill.training.options import split_terms

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
from methods import METHODS, Cell, holm, rows_of


def test_holm_multiplies_the_smallest_p_values_most():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_methods_are_compared_with_the_power_divergence_on_as_many_images():
    base, kl, features = [0.40, 0.44, 0.42, 0.46], [0.41, 0.42, 0.43, 0.44], [0.50, 0.53, 0.52, 0.55]
    rows = rows_of(
        {
            Cell(500, "power", "demo"): base,
            Cell(500, "kl", "demo"): kl,
            Cell(500, "features", "features"): features,
            Cell(2000, "power", "demo"): features,
            Cell(2000, "kl", "demo"): base,
        }
    )
    of = {(row["images"], row["method"]): row for row in rows}
    assert of[500, "power"]["p"] is None
    assert of[500, "features"]["difference"] == pytest.approx(0.095)
    assert of[500, "features"]["p"] == pytest.approx(2 * ttest_rel(features, base).pvalue)
    assert of[500, "kl"]["p"] == pytest.approx(ttest_rel(kl, base).pvalue)
    assert of[2000, "kl"]["difference"] == pytest.approx(-0.095)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_loss(name: str):
    assert Objective(split_terms(METHODS[name].loss)).needs.outputs or METHODS[name].options
