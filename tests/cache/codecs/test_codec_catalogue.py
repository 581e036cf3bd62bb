"""Fitting codecs by name: options, pilots, "auto", and what each codec stores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from redistill_cache.codecs import CodecOptions, explain_codec, fit_codec
from redistill_cache.errors import Refused, UsageError


@pytest.mark.parametrize("options", [{"fidelity": 0.0}, {"fidelity": 7.0}, {"metric": "l1"}, {"rounding": "up"}])
def test_invalid_options_are_refused(options):
    with pytest.raises(UsageError):
        fit_codec("linear", np.zeros((4, 4), np.float32), **options)


def test_invalid_pilots_are_refused():
    with pytest.raises(Refused):
        fit_codec("linear", np.zeros((0, 4), np.float32))
    with pytest.raises(Refused):
        fit_codec("linear", np.zeros(4, np.float32))
    with pytest.raises(Refused):
        fit_codec("linear", np.full((4, 4), np.nan, np.float32))
    with pytest.raises(Refused):
        fit_codec("linear", np.zeros((4, 4), np.float32), head=(np.zeros((3, 2)), np.zeros(3)))
    with pytest.raises(UsageError, match="auto"):
        fit_codec("gzip", np.zeros((4, 4), np.float32))
    with pytest.raises(UsageError, match="features"):
        fit_codec("topk", np.zeros((4, 4), np.float32), metric="relative")


def test_auto_explains_its_choice():
    rng = np.random.default_rng(2)
    rows = (3 * rng.normal(size=(500, 6)) @ rng.normal(size=(6, 40))).astype(np.float32)
    choice = explain_codec("auto", rows, CodecOptions())
    assert choice.codec.name == "linear"
    assert "float16" in choice.reason
    assert "bytes" in choice.reason
    features = explain_codec(
        "auto", rng.normal(size=(200, 3)).astype(np.float32), CodecOptions(metric="relative", fidelity=1e-4)
    )
    assert features.codec.name in ("float16", "linear")


def test_topk_stores_the_top_k_and_the_log_sum_exp():
    rng = np.random.default_rng(3)
    rows = (3 * rng.normal(size=(50, 30))).astype(np.float32)
    codec = fit_codec("topk", rows, k=5)
    encoded = codec.encode(rows)
    decoded = codec.decode(encoded.arrays)
    assert not codec.full_rows
    top = np.argsort(-rows, axis=1)[:, :5]
    np.testing.assert_array_equal(np.take_along_axis(decoded, top, 1), np.take_along_axis(rows, top, 1))
    np.testing.assert_allclose(np.log(np.exp(decoded).sum(1)), np.log(np.exp(rows).sum(1)), rtol=1e-5)
    assert encoded.errors["kl_t4"].mean() > 1e-3  # reported, not hidden


def test_topk_encodes_torch_rows_as_numpy_rows():
    rows = np.random.default_rng(4).normal(size=(20, 30)).astype(np.float32)
    codec = fit_codec("topk", rows, k=5)
    on_numpy, on_torch = codec.encode(rows), codec.encode(torch.from_numpy(rows))
    for name in ("index", "value"):
        np.testing.assert_array_equal(np.asarray(on_torch.arrays[name]), on_numpy.arrays[name])


@pytest.mark.parametrize("keep_shift", [False, True])
@pytest.mark.parametrize("name", ["linear", "float16", "float32", "compander", "topk"])
def test_keeps_shift_is_true_exactly_if_decoding_restores_the_row_mean(name, keep_shift):
    rng = np.random.default_rng(7)
    rows = (rng.normal(size=(300, 20)) + 50 * rng.normal(size=(300, 1))).astype(np.float32)
    codec = fit_codec(name, rows, keep_shift=keep_shift, k=20)
    error = codec.decode(codec.encode(rows).arrays).mean(1) - rows.mean(1)
    assert (np.abs(error).max() < (1e-4 if name == "linear" else 1e-2)) == codec.keeps_shift
    if name in ("linear", "float16"):
        assert codec.keeps_shift == keep_shift


def test_auto_fits_no_basis_to_few_rows_where_the_head_is_known():
    rng = np.random.default_rng(2)
    weight, bias = rng.normal(size=(60, 12)), rng.normal(size=60)
    rows = (np.maximum(rng.normal(size=(130, 12)), 0.0) @ weight.T + bias).astype(np.float32)
    few = explain_codec("auto", rows[:100], CodecOptions(head=(weight, bias)))
    assert few.best.label == "linear in the axes of the head"
    assert "linear " not in few.reason.partition("tried:")[2].replace("linear in the axes of the head", "")
    for other in (
        explain_codec("auto", rows, CodecOptions(head=(weight, bias))),  # enough rows
        explain_codec("auto", rows[:100], CodecOptions()),  # no head
    ):
        assert "linear " in other.reason.partition("tried:")[2].replace("linear in the axes of the head", "")
