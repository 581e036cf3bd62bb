"""A second implementation reads an archive: tensorstore opens every array, and logits follow from FORMAT.md alone.

redistill_cache decodes nothing here; it only writes the archive and gives the expected values. The certificate of every
row is checked by a program of its own, in float64.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore
from redistill_cache import fetch_archive
from redistill_cache.codecs import BlockStats, fit_codec
from redistill_cache.packing import pack
from redistill_cache.spec import ArchiveSpec, SignalSpec, TeacherSpec
from redistill_cache.writer import ArchiveWriter

from tests import tiny_archive
from tests.faults import scenario
from tests.tiny_archive import stored_logits


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


def divergences(exact: np.ndarray, stored: np.ndarray, temperature: float) -> np.ndarray:
    """KL(softmax(exact / T) || softmax(stored / T)) of every row in float64, as a textbook has it."""
    log_p, log_q = (
        z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
        for z in (exact / temperature, stored / temperature)
    )
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


def write_logits(path: Path, rows: np.ndarray, pilot: np.ndarray, fidelity: float) -> None:
    codec = fit_codec("linear", pilot, fidelity=fidelity)
    spec = ArchiveSpec(num_samples=len(rows), num_views=1, num_classes=rows.shape[1], block_rows=8192)
    writer = ArchiveWriter.create(path, spec)
    keys = [f"{i:06d}" for i in range(len(rows))]
    digests = np.random.default_rng(0).integers(0, 256, (len(rows), 32)).astype(np.uint8)
    writer.write_samples(keys, np.full(len(rows), -1), digests, np.full((len(rows), 2), 32, np.uint32))
    writer.add_teacher(TeacherSpec("net", (SignalSpec.of("logits", codec),), {}), {"logits": codec.side()})
    for block in writer.missing("teachers/net"):
        encoded = codec.encode(rows[block.start : block.stop])
        arrays = {f"logits/{name}": np.asarray(array) for name, array in encoded.arrays.items()}
        writer.write(block, arrays, {"logits": BlockStats.of(encoded).to_json()})
    writer.seal()


COUNTS = [pytest.param(100_000, marks=pytest.mark.slow), 4_000]


@pytest.mark.parametrize("fidelity", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("count", COUNTS)
def test_the_certificate_of_every_row_holds_by_format_md_alone(tmp_path: Path, count: int, fidelity: float):
    """Rows as of a teacher, rows unlike the pilot's, and rows that no step brings within the bound."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(60, 50)) * (60.0 / np.arange(1, 61) ** 1.2)[:, None]
    rows = rng.normal(size=(count, 60)) @ mix / 8.0
    rows[::50] *= 40.0  # far outside of the digits
    rows[7::50] += 1000.0 * rng.standard_cauchy(size=rows[7::50].shape).clip(-1e6, 1e6)
    rows[11::50] = 1e-3 * rng.normal(size=rows[11::50].shape)
    rows = rows.astype(np.float32)
    pilot = (rng.normal(size=(2000, 60)) @ mix / 8.0).astype(np.float32)
    path = tmp_path / "a.redistill.zarr"
    write_logits(path, rows, pilot, fidelity)
    stored = linear_logits(path / "teachers/net/logits")[0]
    exact = rows.astype(np.float64)
    errors = np.stack([divergences(exact, stored, temperature) for temperature in (1.0, 4.0)])
    assert errors.shape == (2, count)
    assert errors.max() <= fidelity
    # The bound is used, not met by storing everything exactly; and this program would see a row that is not its own.
    level = read(path / "teachers/net/logits/level")[0]
    assert np.median(errors.max(0)) > fidelity / 10
    assert ((level & 0x40) != 0).any()
    assert 0 < ((level & 0x80) != 0).mean() < 0.05
    assert (divergences(exact, np.roll(stored, 1, axis=0), 1.0) > fidelity).mean() > 0.9


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


def test_a_copy_with_one_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_archive.make(tmp_path / "whole", teachers=("other", "tiny"))
    pack(tmp_path / "whole", tmp_path / "packed")
    copy = fetch_archive(str(tmp_path / "packed"), tmp_path / "copy", views=2, teachers=["tiny"])
    logits = copy / "teachers/tiny/logits"
    for view in range(2):
        flags, exact, shift = (read(logits / name)[view] for name in ("flags", "exact", "shift"))
        rows = np.where(flags[:, None] != 0, exact, read(logits / "values")[view] + shift[:, None])
        assert np.array_equal(rows, stored_logits(view))
        assert np.array_equal(read(copy / "views/crop")[view], tiny_archive.view_params(view)["crop"])
    assert not read(logits / "values")[2].any()
    for array in ("values", "exact", "flags"):
        assert not read(copy / "teachers/other/logits" / array).any(), "fill values: nothing of it is here"
