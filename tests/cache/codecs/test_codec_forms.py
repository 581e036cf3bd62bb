"""The encoder's loops exist in several forms: compiled by numba, as arrays of numpy and torch, and in Triton.

All of them must encode the same bytes and measure the same errors.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from redistill_cache.codecs import fit_codec
from redistill_cache.codecs.backend import Backend
from redistill_cache.codecs.device_search import encode_on_device
from redistill_cache.codecs.divergence import Softmax
from redistill_cache.codecs.linear_encode import Quantizer, compiled_loops, encode_linear
from redistill_cache.codecs.rounding import ArraySweeps, Factors

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden-v1.redistill.zarr"
HOST = Backend(torch, torch.device("cpu"))


def logits(count: int, width: int, scale: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rank = min(width, 40)
    return (
        scale * rng.normal(size=(count, rank)) * np.exp(-np.arange(rank) / 8) @ rng.normal(size=(rank, width))
    ).astype(np.float32)


def adversarial(rows: np.ndarray) -> np.ndarray:
    """Ties, constant rows, saturated rows, huge and tiny values, one class far above all others."""
    rows = rows.copy()
    rows[0] = 0
    rows[1] = 7.25
    rows[2] *= 1e5
    rows[3] *= 1e-6
    rows[4] = 1e35
    rows[5] *= 1e20
    rows[6, rows.shape[1] // 2] = 3e4
    rows[7] = np.rint(rows[7])
    rows[8] = np.rint(rows[8] * 2) / 2 + 1e6
    rows[9] = -rows[10]
    return rows


def array_quantizer(codec) -> Quantizer:
    quantizer = Quantizer(codec.decoder, codec.settings, Backend())
    quantizer._loops, quantizer._sweeps = None, ArraySweeps(Backend())
    return quantizer


def on_torch(codec, sweeps, rows: np.ndarray):
    """Encoded by the search of a GPU, with torch on the CPU."""
    quantizer = Quantizer(codec.decoder, codec.settings, HOST)
    quantizer._sweeps = sweeps
    return encode_on_device(quantizer, torch.from_numpy(rows), codec.encode)


def assert_same(found, expected) -> None:
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(np.asarray(found.arrays[name]), np.asarray(array), err_msg=name)
    for name, values in expected.errors.items():
        np.testing.assert_array_equal(found.errors[name], values, err_msg=name)
    np.testing.assert_array_equal(found.top1_kept, expected.top1_kept)


@pytest.mark.parametrize("keep_shift", [False, True])
@pytest.mark.parametrize("rounding", ["shaped", "plain"])
@pytest.mark.parametrize("width", [1, 2, 5, 31, 32, 33, 100, 257])
def test_every_form_encodes_the_same_bytes(width: int, rounding: str, keep_shift: bool):
    assert compiled_loops() is not None, "numba is a dependency"
    rows = adversarial(logits(230, width, 3.0, seed=width))
    codec = fit_codec("linear", rows[100:], rounding=rounding, keep_shift=keep_shift)
    compiled = codec.encode(rows)
    assert_same(encode_linear(array_quantizer(codec), rows), compiled)
    assert_same(on_torch(codec, ArraySweeps(HOST), rows), compiled)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 0.5, 3.0, 20.0, 300.0]), fidelity=st.floats(1e-7, 1.0))
def test_forms_agree_for_any_rows_and_fidelity(seed: int, scale: float, fidelity: float):
    rows = logits(90, 48, scale, seed)
    codec = fit_codec("linear", rows[:60], fidelity=fidelity)
    assert_same(encode_linear(array_quantizer(codec), rows), codec.encode(rows))


class Counted(np.ndarray):
    """A matrix that counts the rows that it is multiplied by."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        if ufunc is np.matmul:
            self.rows.append(len(inputs[0]))
        return getattr(ufunc, method)(*(np.asarray(each) for each in inputs), **options)


def test_a_trial_multiplies_its_rows_alone_and_only_once(monkeypatch: pytest.MonkeyPatch):
    rows = logits(128, 100, 3.0, seed=2)
    codec = fit_codec("linear", rows)
    quantizer = Quantizer(codec.decoder, codec.settings, Backend()).prepared()
    quantizer._matrix = quantizer._matrix.view(Counted)
    quantizer._matrix.rows = []
    trials: list[int] = []
    for name, at in (("quantize", 3), ("project_only", 2)):
        method = getattr(Quantizer, name)
        monkeypatch.setattr(Quantizer, name, lambda *args, at=at, do=method: trials.append(len(args[at])) or do(*args))
    assert_same(encode_linear(quantizer, rows), codec.encode(rows))
    tiles, others = [64, 64], sorted(trials[: len(trials) // 2])  # the second half is of codec.encode
    assert sorted(quantizer._matrix.rows) == sorted([*tiles, *others])
    assert len(set(others)) > 3


INTERPRETED = """
from redistill_cache.codecs import fit_codec
from redistill_cache.codecs.triton_sweeps import TritonSweeps
from tests.cache.codecs.test_codec_forms import assert_same, logits, on_torch
rows = logits(60, 40, 3.0, seed=0)
codec = fit_codec("linear", rows)
assert_same(on_torch(codec, TritonSweeps(), rows[:6]), codec.encode(rows[:6]))
"""


def run(code: str, **variables: str) -> str:
    root = Path(__file__).resolve().parents[3]
    path = os.pathsep.join([str(root), str(root / "cache"), str(root / "cli")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_triton_kernels_agree_in_triton_s_interpreter():
    pytest.importorskip("triton")
    run(INTERPRETED, TRITON_INTERPRET="1")


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None  # as where it is not installed
from redistill_cache.codecs import fit_codec
from redistill_cache.codecs.linear_encode import compiled_loops
from tests.cache.codecs.test_codec_forms import logits
import hashlib
assert compiled_loops() is None
rows = logits(60, 40, 3.0, seed=0)
encoded = fit_codec("linear", rows).encode(rows)
print(hashlib.sha256(b"".join(encoded.arrays[name].tobytes() for name in sorted(encoded.arrays))).hexdigest())
"""


def test_without_numba_the_same_bytes_are_written():
    with_numba = WITHOUT_NUMBA.replace('sys.modules["numba"] = None', "pass").replace("is None", "is not None")
    assert run(WITHOUT_NUMBA) == run(with_numba)


def test_reading_an_archive_imports_neither_numba_nor_torch():
    code = f"""
import sys, redistill_cache
archive = redistill_cache.open_archive({str(GOLDEN)!r})
archive.logits(0, [0, 1])
print(sorted({{"numba", "torch", "triton"}} & sys.modules.keys()))
"""
    assert run(code).strip() == "[]"


def test_autocast_changes_neither_encoded_nor_decoded_rows():
    rows = logits(80, 40, 3.0, seed=3)
    codec = fit_codec("linear", rows)
    encoded = codec.encode(rows)
    on_torch = {name: torch.from_numpy(np.array(array)) for name, array in encoded.arrays.items()}
    decoded = codec.decode(on_torch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = codec.decode(on_torch)
        encoded_again = encode_linear_under_autocast(codec, rows)
    assert again.dtype == torch.float32
    assert torch.equal(again, decoded)
    assert_same(encoded_again, encoded)


def encode_linear_under_autocast(codec, rows):
    with HOST.without_autocast():
        return on_torch(codec, ArraySweeps(HOST), rows)


@pytest.mark.parametrize("size", [1e-9, 1e-4, 0.3, 5.0, 300.0])
def test_divergences_equal_those_of_long_double(size: float):
    rng = np.random.default_rng(int(size * 10))
    rows = logits(20, 60, 4.0, seed=5)
    errors = size * rng.normal(size=rows.shape)
    softmax, index = Softmax.of(Backend(), rows), np.arange(len(rows))
    found = softmax.divergences(Backend(), index, errors)
    compiled = compiled_loops().divergences(softmax.weights, softmax.total_sharp, softmax.total_soft, index, errors)
    for values, other, temperature in zip(found, compiled, (1, 4), strict=True):
        z, e = rows.astype(np.longdouble) / temperature, errors.astype(np.longdouble) / temperature
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        x = e - (p * e).sum(1, keepdims=True)
        exact = np.log1p((p * (np.expm1(x) - x)).sum(1))
        measured = ~np.isnan(values)
        assert measured.any()
        np.testing.assert_allclose(
            values[measured], exact[measured].astype(np.float64), rtol=1e-7 if size < 1e-8 else 1e-11
        )
        np.testing.assert_allclose(other, values, rtol=1e-12)


@pytest.mark.parametrize("dependent", [False, True])
def test_factors_are_those_of_the_matrix(dependent: bool):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(12, 40))
    if dependent:
        matrix[5] = 2 * matrix[3] - matrix[4]
    factors = Factors.of(matrix)
    np.testing.assert_allclose((factors.orthonormal @ factors.triangle).T, matrix, atol=1e-9)
    np.testing.assert_allclose(factors.inverse, np.linalg.pinv(matrix), atol=1e-8)
    assert (np.diag(factors.triangle) >= 0).all()
