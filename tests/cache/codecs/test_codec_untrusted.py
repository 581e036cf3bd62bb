"""Config and side data come from strangers: what does not fit is refused in one line, before anything is decoded."""

from __future__ import annotations

import math

import numpy as np
import pytest
from redistill_cache.codecs import BlockStats, CodecOptions, explain_codec, fit_codec, open_codec
from redistill_cache.codecs.linear_decode import Packing, packing_flaw
from redistill_cache.codecs.linear_fit import fit_packing
from redistill_cache.codecs.space import Space
from redistill_cache.errors import Damaged, RedistillError, Refused, UsageError


@pytest.fixture(scope="module")
def linear():
    rng = np.random.default_rng(0)
    return fit_codec("linear", rng.normal(size=(60, 12)).astype(np.float32) * 3)


CONFIG_LIES = [
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


@pytest.mark.parametrize(("key", "value"), CONFIG_LIES)
def test_a_config_that_lies(linear, key, value):
    with pytest.raises(Damaged) as caught:
        open_codec("linear", 12, {**linear.config(), key: value}, linear.side())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["rank", "basis", "keep_shift"])
def test_a_config_that_lacks_something(linear, key):
    config = linear.config()
    del config[key]
    with pytest.raises(Damaged, match=key):
        open_codec("linear", 12, config, linear.side())


def flipped(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array.reshape(-1)[0] = value
    return array


SIDE_LIES = [
    ("step", lambda a: flipped(a, np.nan)),
    ("step", lambda a: flipped(a, -1.0)),
    ("step", lambda a: flipped(a, 3e38) * 1e30),
    ("scale", lambda a: a.astype(np.float64)),
    ("offset", lambda a: flipped(a, np.inf)),
    ("offset", lambda a: a[:-1]),
    ("basis_low", lambda a: a.astype(object)),
    ("basis_high", lambda a: a[:, :-1]),
    ("slot_coefficient", lambda a: flipped(a, 60000)),
    ("slot_radix", lambda a: flipped(a, 0)),
    ("slot_radix", lambda a: np.full_like(a, 257)),
    ("slot_byte", lambda a: a[::-1].copy()),
    ("slot_byte", lambda a: a + 1),
    ("symbols", lambda a: np.zeros_like(a)),
    ("symbols", lambda _: "symbols"),
]


@pytest.mark.parametrize(("name", "lie"), SIDE_LIES)
@pytest.mark.filterwarnings("ignore:overflow")
def test_side_data_that_lies(linear, name, lie):
    with pytest.raises(Damaged):
        open_codec("linear", 12, linear.config(), {**linear.side(), name: lie(linear.side()[name])})


def test_side_data_that_is_missing(linear):
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
        ("compander", 12, {"fidelity": 1e-3, "scale": 0}),
        ("topk", 12, {"k": 13, "tail": "uniform"}),
        ("topk", 12, {"k": 3, "tail": "zero"}),
        ("topk", 12, []),
    ],
)
def test_other_codecs_that_lie(name, width, config):
    with pytest.raises(RedistillError):
        open_codec(name, width, config, {})


def test_side_data_where_there_should_be_none():
    with pytest.raises(Damaged):
        open_codec("topk", 12, {"k": 3, "tail": "uniform"}, {"basis": np.zeros(3)})


def test_exact_rows_that_are_missing_are_damage(linear):
    rows = np.full((3, 12), 1e33, np.float32)
    rows[:, 0] = 0
    arrays = dict(linear.encode(rows).arrays)
    del arrays["exact"]
    with pytest.raises(Damaged, match="exact"):
        linear.decode(arrays)


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
    ],
)
def test_statistics_that_lie(record):
    with pytest.raises(Damaged):
        BlockStats.from_json(record)


@pytest.mark.parametrize("options", [{"fidelity": 0.0}, {"fidelity": 7.0}, {"metric": "l1"}, {"rounding": "up"}])
def test_options_that_make_no_sense(options):
    with pytest.raises(UsageError):
        fit_codec("linear", np.zeros((4, 4), np.float32), **options)


def test_pilots_that_make_no_sense():
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


def test_every_packing_returns_what_was_packed():
    rng = np.random.default_rng(1)
    for spread in (0.01, 0.5, 3.0, 40.0, 2000.0):
        k = np.rint(rng.normal(size=(500, 40)) * spread * np.exp(-np.arange(40) / 15)).astype(np.int64)
        k[:, 3] = abs(k[:, 3])
        packing = fit_packing(k)
        assert packing_flaw(packing) is None
        within, escape = packing.split(Space(), k.astype(np.float64))
        assert (within + escape * packing.reach == k).all()
        unpacked = packing.unpack(Space(), packing.pack(Space(), within))
        np.testing.assert_array_equal(unpacked, within)
        assert (escape != 0).mean() < 0.05
    assert packing_flaw(Packing.empty(3)) is None


def test_auto_says_why():
    rng = np.random.default_rng(2)
    rows = (3 * rng.normal(size=(500, 6)) @ rng.normal(size=(6, 40))).astype(np.float32)
    choice = explain_codec("auto", rows, CodecOptions())
    assert choice.codec.name == "linear"
    assert "float16" in choice.reason
    assert "bytes" in choice.reason
    exact = explain_codec(
        "auto", rng.normal(size=(200, 3)).astype(np.float32), CodecOptions(metric="relative", fidelity=1e-4)
    )
    assert exact.codec.name in ("float16", "linear")


def test_topk_states_what_it_does_not_know():
    rng = np.random.default_rng(3)
    rows = (3 * rng.normal(size=(50, 30))).astype(np.float32)
    codec = fit_codec("topk", rows, k=5)
    encoded = codec.encode(rows)
    decoded = codec.decode(encoded.arrays)
    assert not codec.full_rows
    assert "one value" in codec.tail_rule
    top = np.argsort(-rows, axis=1)[:, :5]
    np.testing.assert_array_equal(np.take_along_axis(decoded, top, 1), np.take_along_axis(rows, top, 1))
    np.testing.assert_allclose(np.log(np.exp(decoded).sum(1)), np.log(np.exp(rows).sum(1)), rtol=1e-5)
    assert encoded.kl_t4.mean() > 1e-3  # and nobody is told otherwise
