"""`webdataset_views`: the pixels, labels and rows of a `ViewDataset`, in a pipeline of webdataset's stages."""

from __future__ import annotations

import io
import pickle
import re
import runpy
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from redistill_cache import Archive, open_archive
from redistill_cache.errors import Refused, UsageError

import redistill
from tests.flaky_server import Flaky, serving
from tests.small_archive import cache

ROOT = Path(__file__).resolve().parents[3]
COUNT = 30


def pack(path: Path, samples: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars, and an archive of them."""
    root = tmp_path_factory.mktemp("data")
    source = redistill.open_source(f"synthetic?n={COUNT}&classes=8")
    for number in range(3):
        members = {}
        for i in range(10 * number, 10 * number + 10):
            out, sample = io.BytesIO(), source.sample(i)
            Image.fromarray(sample.payload).save(out, "PNG")
            members |= {
                f"d/{i:03d}.png": out.getvalue(),
                f"d/{i:03d}.cls": b"%d" % sample.label,
                f"d/{i:03d}.pyd": b"x",
            }
        pack(root / f"t{number}.tar", members)
    cache(root / "a.redistill.zarr", f"wds:{root}", views=2)
    return root


def test_the_items_are_those_of_a_view_dataset(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    archive = open_archive(data / "a.redistill.zarr")
    dataset = redistill.ViewDataset(f"wds:{data}", archive, size=24)
    expected = {item.row: item for item in (dataset[dataset.index(1, row)] for row in range(COUNT))}
    with serving(Flaky({path.name: path.read_bytes() for path in data.glob("*.tar")})) as server:
        for urls in (f"{data}/t{{0..2}}.tar", [f"{server.address}/t{number}.tar" for number in range(3)]):
            pipeline = pickle.loads(pickle.dumps(redistill.webdataset_views(urls, archive, 1, size=24)))
            items = list(pipeline)
            assert sorted(row for _, _, row in items) == list(range(COUNT))
            for pixels, label, row in items:
                assert torch.equal(pixels, expected[row].pixels)
                assert label == expected[row].label
    batches = list(redistill.webdataset_views(f"{data}/t{{0..2}}.tar", archive).shuffle(9, seed=0).batched(8))
    assert [tuple(pixels.shape) for pixels, _, _ in batches] == [(8, 3, 32, 32)] * 3 + [(6, 3, 32, 32)]


def test_what_does_not_match_is_refused(data: Path, tmp_path: Path):
    archive = open_archive(data / "a.redistill.zarr")
    with tarfile.open(data / "t0.tar") as tar:
        image = tar.extractfile("d/000.png").read()
    pack(tmp_path / "unknown.tar", {"d/000.png": image, "d/other.png": image})
    with pytest.raises(Refused, match=r"'d/other' in .*unknown\.tar: the archive has no such key"):
        list(redistill.webdataset_views(str(tmp_path / "unknown.tar"), archive))
    assert len(list(redistill.webdataset_views(str(tmp_path / "unknown.tar"), archive, allow_missing=True))) == 1
    pack(tmp_path / "changed.tar", {"d/001.png": image})
    with pytest.raises(Refused, match=r"'d/001' .* is not the image that the archive was made from"):
        list(redistill.webdataset_views(str(tmp_path / "changed.tar"), archive))
    for name in ("pipe:touch x", "file:///x.tar", "ftp://host/x.tar"):
        for urls in (name, [name]):
            with pytest.raises((UsageError, Refused)):
                list(redistill.webdataset_views(urls, archive))
    with pytest.raises(Refused, match="views do not match the archive"):
        list(redistill.webdataset_views(f"{data}/t{{0..2}}.tar", OtherCrops(archive)))


class OtherCrops:
    """An archive that is read wrongly: with the parameters of another view."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive

    def __getattr__(self, name: str) -> object:
        return getattr(self.archive, name)

    def view_params(self, view: int) -> Mapping[str, np.ndarray]:
        return self.archive.view_params(1 - view)


def test_the_example_runs(data: Path, capsys: pytest.CaptureFixture[str]):
    module = runpy.run_path(str(ROOT / "examples" / "webdataset_loop.py"))
    module["main"](str(data / "a.redistill.zarr"), f"{data}/t{{0..2}}.tar", 2)
    assert re.search(r"^epoch 2: loss \d\.\d+$", capsys.readouterr().out, re.M)
