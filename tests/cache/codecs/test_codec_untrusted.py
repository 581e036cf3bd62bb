"""Untrusted config, side data and statistics are refused in one line, before anything is decoded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from redistill_cache.codecs import BlockStats, fit_codec, open_codec
from redistill_cache.errors import Damaged, RedistillError


@pytest.fixture(scope="module")
def linear():
    rng = np.random.default_rng(0)
    return fit_codec("linear", rng.normal(size=(60, 12)).astype(np.float32) * 3)


BAD_CONFIGS = [
    ("rank", 0),
    ("rank", -1),
    ("rank", 10**9),
    ("rank", 11.0),
    ("rank", True),
    ("slots", 10**6),
    ("bytes", 0),
    ("metric", "l2"),
    ("metric", ["kl"]),
    ("fidelity", math.nan),
    ("fidelity", "1e-3"),
    ("level", 64),
    ("certified", 1),
    ("rounding", None),
    ("reference", math.inf),
    ("extra", 1),
]


@pytest.mark.parametrize(("key", "value"), BAD_CONFIGS)
def test_an_invalid_config_is_refused(linear, key, value):
    with pytest.raises(Damaged) as caught:
        open_codec("linear", 12, {**linear.config(), key: value}, linear.side())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["rank", "basis", "keep_shift"])
def test_a_config_without_a_key_is_refused(linear, key):
    config = linear.config()
    del config[key]
    with pytest.raises(Damaged, match=key):
        open_codec("linear", 12, config, linear.side())


def with_first(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.reshape(-1)[0] = value
    return array


BAD_SIDE_DATA = [
    ("step", lambda a: with_first(a, np.nan)),
    ("step", lambda a: with_first(a, -1.0)),
    ("step", lambda a: with_first(a, 3e38) * 1e30),
    ("scale", lambda a: a.astype(np.float64)),
    ("offset", lambda a: with_first(a, np.inf)),
    ("offset", lambda a: a[:-1]),
    ("basis_low", lambda a: a.astype(object)),
    ("basis_high", lambda a: a[:, :-1]),
    ("slot_coefficient", lambda a: with_first(a, 60000)),
    ("slot_radix", lambda a: with_first(a, 0)),
    ("slot_radix", lambda a: np.full_like(a, 257)),
    ("slot_byte", lambda a: a[::-1].copy()),
    ("slot_byte", lambda a: a + 1),
    ("symbols", lambda a: np.zeros_like(a)),
    ("symbols", lambda _: "symbols"),
]


@pytest.mark.parametrize(("name", "change"), BAD_SIDE_DATA)
@pytest.mark.filterwarnings("ignore:overflow")
def test_invalid_side_data_is_refused(linear, name, change):
    with pytest.raises(Damaged):
        open_codec("linear", 12, linear.config(), {**linear.side(), name: change(linear.side()[name])})


def test_missing_side_data_is_refused(linear):
    for name in linear.side():
        with pytest.raises(Damaged, match=name):
            open_codec("linear", 12, linear.config(), {k: v for k, v in linear.side().items() if k != name})


@pytest.mark.parametrize(
    ("name", "width", "config"),
    [
        ("pickle", 12, {}),
        ("float16", 0, {"metric": "kl", "fidelity": 1e-3, "keep_shift": False}),
        ("float16", 12, {"metric": "kl"}),
        ("float32", 2**40, {"metric": "kl"}),
        ("float32", 1_000_001, {"metric": "kl"}),
        ("compander", 12, {"fidelity": 1e-3, "scale": 0}),
        ("topk", 12, {"k": 13, "tail": "uniform"}),
        ("topk", 12, {"k": 3, "tail": "zero"}),
        ("topk", 12, []),
    ],
)
def test_an_invalid_config_of_other_codecs_is_refused(name, width, config):
    with pytest.raises(RedistillError):
        open_codec(name, width, config, {})


def test_side_data_of_a_codec_without_any_is_refused():
    with pytest.raises(Damaged):
        open_codec("topk", 12, {"k": 3, "tail": "uniform"}, {"basis": np.zeros(3)})


def test_missing_exact_rows_are_damage(linear):
    rows = np.full((3, 12), 1e33, np.float32)
    rows[:, 0] = 0
    arrays = dict(linear.encode(rows).arrays)
    del arrays["exact"]
    with pytest.raises(Damaged, match="exact"):
        linear.decode(arrays)


NO_ERRORS = {"sum": 0, "max": 0, "histogram": []}


def with_errors(stats: dict) -> dict:
    return {"rows": 1, "exact_rows": 0, "top1_kept": 0, "errors": {"kl_t1": stats}}


@pytest.mark.parametrize(
    "record",
    [
        None,
        {},
        {"rows": 1, "exact_rows": 2, "top1_kept": 0, "errors": {}},
        {"rows": 1.0, "exact_rows": 0, "top1_kept": 0, "errors": {}},
        with_errors({"sum": math.nan, "max": 0, "histogram": []}),
        with_errors({"sum": 0, "max": 0, "histogram": [[1]]}),
        with_errors({"sum": 0, "max": 0, "histogram": [[10**9, 1]]}),
        with_errors({"sum": 0, "max": -1, "histogram": []}),
        with_errors({"sum": 0, "max": 0, "histogram": [[1, True]]}),
        with_errors({"sum": 0, "max": 0, "histogram": [], "extra": 0}),
        with_errors({"sum": 0, "max": 0, "histogram": []}),  # of no row
        with_errors({"sum": 2.0, "max": 1.0, "histogram": [[480, 1]]}),  # a mean above the maximum
        with_errors({"sum": 1.0, "max": 5.0, "histogram": [[480, 1]]}),  # a maximum above the last bin
        with_errors({"sum": 0.5, "max": 0.5, "histogram": [[480, 1]]}),  # and below it
        with_errors({"sum": 0.0, "max": 1.0, "histogram": [[480, 1]]}),  # a mean below all bins
        {"rows": 1, "exact_rows": 0, "top1_kept": 0, "errors": dict.fromkeys("abcdefghi", NO_ERRORS)},
    ],
)
def test_invalid_statistics_are_refused(record):
    with pytest.raises(Damaged):
        BlockStats.from_json(record)
    BlockStats.from_json(with_errors({"sum": 1.0, "max": 1.0, "histogram": [[480, 1]]}))
