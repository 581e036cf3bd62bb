"""Codecs on a GPU, a simulated one: the bytes of the CPU, and decoding for which the host does not wait."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from redistill_cache.codecs import NotFinite, device_search, fit_codec
from redistill_cache.codecs.linear_encode import Quantizer
from redistill_cache.codecs.protocol import indices_of, join_encoded
from redistill_cache.rows import PackedView, _located

from redistill.cached_teacher import decode_rows
from tests.simulated_cuda import simulated_cuda

GPU = torch.device("cuda", 0)
# (name, its settings, the sparse arrays that some of the rows below need)
CODECS = [
    ("linear", {"keep_shift": True}, {"escape", "exact"}),
    ("linear", {"metric": "relative"}, {"escape", "exact"}),
    ("compander", {"fidelity": 1e-6}, {"q_high", "exact"}),
    ("float16", {"keep_shift": True, "fidelity": 1e-9}, {"exact"}),
    ("float32", {}, set()),
    ("topk", {"k": 5}, set()),
]


def logits() -> np.ndarray:
    """Of 40 classes; some of the last rows need an escape, or are stored exactly."""
    rng = np.random.default_rng(0)
    rows = 3.0 * (rng.normal(size=(160, 12)) * np.exp(-np.arange(12) / 4)) @ rng.normal(size=(12, 40))
    rows[130:140] *= 8
    rows[140:150] = 20 * rng.normal(size=(10, 40))
    rows[150:155] = 1e6 * rng.normal(size=(5, 40))
    return rows.astype(np.float32)


def packed_view(codec, rows: np.ndarray) -> PackedView:
    arrays = {name: np.asarray(array) for name, array in codec.encode(rows).arrays.items()}
    needed = {name: np.flatnonzero(needs) for name, needs in codec.rows_needing(arrays).items() if needs.any()}
    sparse = _located(len(rows), {name: (index, arrays[name][index]) for name, index in needed.items()})
    return PackedView(0, codec, {name: arrays[name] for name in arrays.keys() - codec.sparse}, sparse)


@pytest.mark.parametrize(("name", "settings", "needed"), CODECS)
def test_the_bytes_and_the_rows_are_those_of_the_cpu(name: str, settings: dict, needed: set):
    rows = logits()
    codec = fit_codec(name, rows[:120], **settings)
    expected, view = codec.encode(rows), packed_view(codec, rows)
    assert view.sparse.keys() == needed
    with simulated_cuda():
        encoded = codec.encode(torch.from_numpy(rows).to(GPU))
        arrays = join_encoded([encoded]).arrays  # on the host
        decoded = decode_rows(view, np.arange(len(rows)), GPU)
        assert (decoded.device, decoded.dtype) == (GPU, torch.float32)
        decoded = decoded.cpu().numpy()
    for key, array in expected.arrays.items():
        np.testing.assert_array_equal(arrays[key], array, err_msg=key)
    np.testing.assert_allclose(decoded, view.decode(np.arange(len(rows))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "settings", "needed"), CODECS)
def test_decoding_under_autocast_gives_the_same_rows_and_the_host_never_waits(name: str, settings: dict, needed: set):
    rows = logits()
    codec = fit_codec(name, rows[:120], **settings)
    view = packed_view(codec, rows)
    with simulated_cuda() as gpu:
        first = decode_rows(view, np.arange(len(rows)), GPU)  # copies constants
        with gpu.counting() as syncs, torch.autocast("cuda", torch.bfloat16):
            again = decode_rows(view, np.arange(len(rows)), GPU)
            few = decode_rows(view, np.array([141, 3, 152]), GPU)
        assert [str(sync) for sync in syncs] == []
        assert torch.equal(again.cpu(), first.cpu())
        torch.testing.assert_close(few.cpu(), first.cpu()[[141, 3, 152]])


def test_gathered_rows_name_the_rows_that_sparse_arrays_hold():
    rows = logits()
    codec = fit_codec("linear", rows[:120])
    gathered = packed_view(codec, rows).gather(np.array([3, 152, 4, 151]))
    np.testing.assert_array_equal(gathered[indices_of("exact")], [1, 3])
    assert len(gathered["exact"]) == 2


@pytest.mark.parametrize(
    ("settings", "slab_rows"), [({"keep_shift": True}, None), ({"rounding": "plain"}, 64), ({"metric": "centred"}, 64)]
)
def test_the_host_waits_once_while_a_piece_is_encoded(monkeypatch: pytest.MonkeyPatch, settings, slab_rows):
    """What a row tries next is decided on the device; also where a piece is searched in several slabs."""
    rows = logits()[:140]  # of the others, some are stored exactly, and are read when that is known
    codec = fit_codec("linear", rows[:120], **settings)
    if slab_rows:
        monkeypatch.setattr(Quantizer, "slab_rows", slab_rows)
    with simulated_cuda() as gpu:
        on_gpu = torch.from_numpy(rows).to(GPU)
        codec.encode(on_gpu)  # copies constants
        with gpu.counting() as syncs:
            encoded = join_encoded([codec.encode(on_gpu)])
    assert len(syncs) == 1, list(map(str, syncs))
    assert len(np.unique(encoded.arrays["level"] & 0x3F)) > 5


def test_rows_that_the_device_does_not_finish_are_encoded_on_the_host(monkeypatch: pytest.MonkeyPatch):
    rows = logits()
    codec = fit_codec("linear", rows[:120], rounding="plain")
    expected = codec.encode(rows)
    monkeypatch.setattr(device_search, "ROUNDS", (4,))
    with simulated_cuda():
        encoded = join_encoded([codec.encode(torch.from_numpy(rows).to(GPU))])
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(encoded.arrays[name], array, err_msg=name)
    for name, values in expected.errors.items():
        np.testing.assert_array_equal(encoded.errors[name], values, err_msg=name)


def test_rows_that_are_not_finite_are_named_after_the_one_wait():
    rows = logits()
    codec = fit_codec("linear", rows[:120], rounding="plain")
    rows[[3, 17], 4] = np.nan, np.inf
    with simulated_cuda(), pytest.raises(NotFinite) as caught:
        codec.encode(torch.from_numpy(rows).to(GPU))
    assert caught.value.rows == [3, 17]
