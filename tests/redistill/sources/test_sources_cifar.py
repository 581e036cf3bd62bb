"""`cifar10:` and `cifar100:`: torchvision's layout, stable keys, and pickles whose code never runs."""

from __future__ import annotations

import hashlib
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redistill_cache import download
from redistill_cache.errors import Refused, UsageError
from torchvision.datasets import CIFAR10, CIFAR100

import redistill
from redistill.sources.base import ListedSource
from redistill.sources.index import index_source

NAMES = [f"class{i}" for i in range(10)]


def images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), np.uint8)


def write(path: Path, content: Any, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


def write_cifar10(root: Path, *, protocol: int = 2, n: int = 3) -> Path:
    folder = root / "cifar-10-batches-py"
    for b in range(1, 6):
        labels = [(b + i) % 10 for i in range(n)]
        write(folder / f"data_batch_{b}", {"data": images(n, b), "labels": labels, "batch_label": "x"}, protocol)
    write(folder / "test_batch", {"data": images(2, 9), "labels": [7, 8]}, protocol)
    write(folder / "batches.meta", {"label_names": NAMES, "num_vis": 3072}, protocol)
    return root


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_keys_labels_pixels_and_classes(tmp_path: Path, protocol: int):
    root = write_cifar10(tmp_path, protocol=protocol)
    source = redistill.open_source(f"cifar10:{root}")
    assert isinstance(source, ListedSource)
    assert len(source) == 15
    assert source.class_names == tuple(NAMES)
    assert source.keys[0] == "train/data_batch_1/00000"
    assert source.keys[14] == "train/data_batch_5/00002"
    sample = source.sample(4)
    assert (sample.key, sample.label) == ("train/data_batch_2/00001", 3)
    assert np.array_equal(sample.payload, images(3, 2)[1].reshape(3, 32, 32).transpose(1, 2, 0))
    val = redistill.open_source(f"cifar10:{root}?split=val")
    assert list(val.keys) == ["val/test_batch/00000", "val/test_batch/00001"]
    assert val.labels.tolist() == [7, 8]


def test_a_file_as_python_2_wrote_it(tmp_path: Path):
    """The published files hold Python 2 strings (SHORT_BINSTRING and BINSTRING), which Python 3 no longer writes."""
    root = write_cifar10(tmp_path)
    pixels = images(2, 9)
    raw = pixels.tobytes()
    text = b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    text += b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
    text += (
        b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb\x89T"
        + len(raw).to_bytes(4, "little")
        + raw
        + b"tbU\x06labels](K\x03K\x04eu."
    )
    assert np.array_equal(pickle.loads(text, encoding="latin1")["data"], pixels)  # what numpy would read
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(text)
    source = redistill.open_source(f"cifar10:{root}?split=val")
    assert source.labels.tolist() == [3, 4]
    assert np.array_equal(source.sample(1).payload, pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))


def test_the_same_samples_as_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write_cifar10(tmp_path)
    folder = root / "cifar-10-batches-py"
    for attribute in ("train_list", "test_list"):
        sums = [[name, md5(folder / name)] for name, _ in getattr(CIFAR10, attribute)]
        monkeypatch.setattr(CIFAR10, attribute, sums)
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    torchvision_set = CIFAR10(root, train=True)
    source = redistill.open_source(f"cifar10:{root}")
    assert source.original
    assert source.description == {"kind": "cifar10", "split": "train", "original": True}
    assert [source.sample(i).label for i in range(len(source))] == torchvision_set.targets
    assert np.array_equal(np.stack([source.sample(i).payload for i in range(len(source))]), torchvision_set.data)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def test_cifar100_uses_the_fine_labels(tmp_path: Path):
    folder = tmp_path / "cifar-100-python"
    fine = [f"fine{i}" for i in range(100)]
    write(folder / "train", {"data": images(2, 0), "fine_labels": [99, 0], "coarse_labels": [1, 2]})
    write(folder / "test", {"data": images(1, 1), "fine_labels": [5], "coarse_labels": [1]})
    write(folder / "meta", {"fine_label_names": fine, "coarse_label_names": ["c"]})
    source = redistill.open_source(tmp_path)  # a bare path is recognised by the folder in it
    assert source.spec.startswith("cifar100:")
    assert source.labels.tolist() == [99, 0]
    assert source.class_names == tuple(fine)
    assert not source.original
    assert list(redistill.open_source(f"cifar100:{folder}?split=val").keys) == ["val/test/00000"]


def test_a_pickled_source_is_small_and_reads_the_files_again(tmp_path: Path):
    source = redistill.open_source(f"cifar10:{write_cifar10(tmp_path, n=50)}")
    text = pickle.dumps(source)
    assert len(text) < 20_000
    again = pickle.loads(text)
    assert np.array_equal(again.sample(60).payload, source.sample(60).payload)
    write_cifar10(tmp_path, n=49)
    with pytest.raises(Refused, match="changed since"):
        pickle.loads(text).sample(0)


def test_the_index_is_cached_until_a_file_changes(tmp_path: Path):
    root = write_cifar10(tmp_path / "data")
    for file in (root / "cifar-10-batches-py").iterdir():
        os.utime(file, (1e9, 1e9))
    first = index_source(redistill.open_source(f"cifar10:{root}"))
    assert first.reused == 0
    assert first.sizes.tolist() == [[32, 32]] * 15
    again = index_source(redistill.open_source(f"cifar10:{root}"))
    assert again.reused == 15
    write(root / "cifar-10-batches-py" / "data_batch_3", {"data": images(3, 77), "labels": [1, 2, 3]})
    third = index_source(redistill.open_source(f"cifar10:{root}"))
    assert third.reused == 12
    assert (third.digests != first.digests).any(axis=1).nonzero()[0].tolist() == [6, 7, 8]


class Carrier:
    """Calls a function when it is unpickled, like a hostile file."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["data_batch_2", "batches.meta"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, name: str, protocol: int):
    root, trace = write_cifar10(tmp_path), tmp_path / "code-ran"
    content = {"data": images(3, 0), "labels": [1, 2, 3], "label_names": NAMES, "x": Carrier(Path.touch, trace)}
    write(root / "cifar-10-batches-py" / name, content, protocol)
    with pytest.raises(Refused, match=rf"{name}' is refused: it refers to") as refused:
        redistill.open_source(f"cifar10:{root}")
    assert "\n" not in str(refused.value)
    assert not trace.exists()


@pytest.mark.parametrize("function", [eval, getattr, __import__, print, np.load, np.frombuffer, type, exec])
def test_no_other_name_is_resolved(tmp_path: Path, function: Any):
    root = write_cifar10(tmp_path)
    write(root / "cifar-10-batches-py" / "test_batch", Carrier(function, "1"))
    with pytest.raises(Refused, match=r"test_batch' is refused: it refers to"):
        redistill.open_source(f"cifar10:{root}?split=val")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": images(2, 0), "labels": [1]}),
        pickle.dumps({"data": images(2, 0), "labels": [1, -1]}),
        pickle.dumps({"data": images(2, 0), "labels": [1, 10]}),
        pickle.dumps({"data": images(2, 0), "labels": [1, "2"]}),
        pickle.dumps({"data": images(2, 0), "fine_labels": [1, 2]}),
        pickle.dumps({"data": images(2, 0).astype(np.int16), "labels": [1, 2]}),
        pickle.dumps({"data": images(2, 0)[:, :100], "labels": [1, 2]}),
        pickle.dumps({"data": np.array([[None] * 3072] * 2), "labels": [1, 2]}),
        pickle.dumps({"data": images(2, 0), "labels": [1, 2]})[:-500],
        pickle.dumps({"data": images(2, 0), "labels": [1, 2]}, 2).replace(b"latin1", b"rot-13"),
        b"\x80\x02}(U\x04datacnumpy\ndtype\n)RU\x06labels]u.",
        b"\x80\x02}(U\x04datacnumpy\nndarray\n)RU\x06labels]u.",
    ],
)
def test_other_and_damaged_content_is_refused_in_one_line(tmp_path: Path, content: bytes):
    root = write_cifar10(tmp_path)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(Refused) as refused:
        redistill.open_source(f"cifar10:{root}?split=val")
    assert "cifar-10-batches-py" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_options_are_checked(tmp_path: Path):
    for text in (f"cifar10:{tmp_path}?split=test", f"cifar10:{tmp_path}?spilt=val", "cifar100:"):
        with pytest.raises(UsageError):
            redistill.open_source(text)
    with pytest.raises(Refused, match=r"found no '.*batches\.meta'.*download=1"):
        redistill.open_source(f"cifar10:{tmp_path}")


def test_download_uses_torchvision_and_only_when_files_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/none.tar.gz")
    monkeypatch.setattr(download, "FIRST_PATIENCE_S", 1.0)
    with pytest.raises(Refused, match=r"could not be downloaded to .*put 'cifar-10-batches-py' there") as refused:
        redistill.open_source(f"cifar10:{tmp_path / 'a'}?download=1")
    assert "\n" not in str(refused.value)
    assert len(redistill.open_source(f"cifar10:{write_cifar10(tmp_path / 'b')}?download=1")) == 15


@pytest.mark.filterwarnings("ignore:.*filter extracted tar archives:DeprecationWarning")
def test_the_downloaded_archive_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any):
    folder = tmp_path / "made" / CIFAR100.base_folder
    for name in ("train", "test"):
        write(folder / name, {"data": images(2, 0), "fine_labels": [0, 1]})
    write(folder / "meta", {"fine_label_names": ["a", "b"]})
    packed = tmp_path / "packed.tar.gz"
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, CIFAR100.base_folder)
    address, requests = serve(tmp_path)
    monkeypatch.setattr(CIFAR100, "url", f"{address}/packed.tar.gz")
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(packed))
    source = redistill.open_source(f"cifar100:{tmp_path / 'to'}?download=1&split=val")
    assert source.labels.tolist() == [0, 1]
    assert set(requests) == {"/packed.tar.gz"}


def test_a_bad_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any):
    address, _ = serve(tmp_path)
    monkeypatch.setattr(CIFAR100, "url", f"{address}/packed.tar.gz")
    for content, reason in ((b"<!DOCTYPE html><p>log in", "a web page instead of the file"), (b"x", "md5")):
        (tmp_path / "packed.tar.gz").write_bytes(content)
        with pytest.raises(Refused, match=f"{reason}.*put 'cifar-100-python' there") as refused:
            redistill.open_source(f"cifar100:{tmp_path / 'to'}?download=1")
        assert "\n" not in str(refused.value)
        assert not list((tmp_path / "to").iterdir())
