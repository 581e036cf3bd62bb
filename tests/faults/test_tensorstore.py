"""A second implementation reads an archive: tensorstore opens every array, and logits follow from FORMAT.md alone.

redistill_cache decodes nothing here; it only writes the archive and gives the expected values.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore
from redistill_cache import fetch_archive
from redistill_cache.packing import pack

from tests.faults import scenario


def read(path: Path) -> np.ndarray:
    """A whole array, by tensorstore's own Zarr v3 driver."""
    store = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}, open=True, read=True
    ).result()
    return np.asarray(store.read().result())


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "a.redistill.zarr"
    scenario.write_archive(path)
    return path


def linear_logits(folder: Path) -> np.ndarray:
    """The codec `linear` of FORMAT.md, implemented a second time, one slot after another."""
    side = {path.name: read(path) for path in (folder / "side").iterdir() if path.is_dir()}
    q, level = read(folder / "q"), read(folder / "level").astype(np.int64)
    basis = (side["basis_high"].astype(np.int16) * 256 + side["basis_low"]) * side["scale"].astype(np.float64)[:, None]
    numbers = np.stack([side["symbols"][byte][q[..., byte]] for byte in range(q.shape[-1])], axis=-1).astype(np.int64)
    k = np.zeros((*q.shape[:-1], len(side["step"])))
    reach = np.ones(len(side["step"]), np.int64)
    for coefficient, radix, low, byte in zip(
        *(side[f"slot_{name}"].astype(int) for name in ("coefficient", "radix", "low", "byte")), strict=True
    ):
        numbers[..., byte], digit = np.divmod(numbers[..., byte], radix)
        k[..., coefficient] += reach[coefficient] * (low + digit)
        reach[coefficient] *= radix
    k += np.where((level & 0x40).astype(bool)[..., None], read(folder / "escape") * reach, 0)
    rows = (k * side["step"] * 2.0 ** (-(level & 0x3F)[..., None] / 8.0)) @ basis + side["offset"]
    return np.where((level & 0x80).astype(bool)[..., None], read(folder / "exact"), rows)


def test_logits_decoded_by_format_md_alone(archive: Path):
    logits = linear_logits(archive / "teachers/net/logits")
    for view in range(scenario.VIEWS):
        np.testing.assert_allclose(logits[view], scenario.decoded(view), rtol=1e-4, atol=1e-4)


def test_view_parameters_samples_and_canaries(archive: Path):
    for view in range(scenario.VIEWS):
        for name, values in scenario.view_params(view).items():
            assert np.array_equal(read(archive / "views" / name)[view], values)
        for name, values in scenario.canaries(view).items():
            assert np.array_equal(read(archive / "canaries" / name)[view], values)
    offsets, data = read(archive / "samples/key_offsets"), read(archive / "samples/key_bytes").tobytes()
    keys = [data[start:stop].decode() for start, stop in itertools.pairwise(offsets)]
    assert keys == list(scenario.KEYS)
    assert np.array_equal(read(archive / "samples/digest"), scenario.DIGESTS)
    assert np.array_equal(read(archive / "samples/label"), scenario.LABELS)
    assert np.array_equal(read(archive / "samples/size"), scenario.SIZES)


def test_every_array_is_plain_zarr_v3(archive: Path):
    arrays = [
        path.parent for path in archive.rglob("zarr.json") if json.loads(path.read_bytes())["node_type"] == "array"
    ]
    assert len(arrays) > 20
    for folder in arrays:
        assert read(folder).size > 0


def test_a_copy_with_some_views(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack(archive, tmp_path / "packed")
    copy = fetch_archive(str(tmp_path / "packed"), tmp_path / "copy", views=1)
    assert np.array_equal(read(copy / "samples/digest"), scenario.DIGESTS)
    for name, values in scenario.view_params(0).items():
        store = read(copy / "views" / name)
        assert np.array_equal(store[0], values)
        assert not store[1:].any()
