"""`cifar10:PATH` and `cifar100:PATH`: torchvision's files on disk, in PATH or in PATH/cifar-10-batches-py.

* `?split=train` (the default) or `?split=val`; the test images of CIFAR are the split 'val'.
* Samples are uint8 arrays [32, 32, 3]; keys name split, file and place in it: 'train/data_batch_1/00042'. Classes are
  those of batches.meta or meta (for CIFAR-100 the 100 fine ones).
* Nothing is downloaded, unless `?download=1` asks torchvision's downloader to put missing files into PATH.
* The files are pickles. No code in one ever runs: the few names such a file needs are answered by recorders of our
  own, not by numpy, and any other name refuses the file. That holds for the published files as for others. The md5
  sums torchvision publishes only tell whether the files are the originals (`original`, also in the description);
  files of the same layout with other sums, such as a subset, are read under the same rules.
* A pickled source holds no pixels; each process that gets one reads the files when first asked for a sample.
"""

from __future__ import annotations

import http.client
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from redistill_cache.errors import Refused, UsageError
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.wording import one_line

from redistill.sources.base import Sample
from redistill.sources.cifar_files import read_batch, read_class_names
from redistill.specs import Spec

__all__ = ["CifarSource", "open_cifar"]

SPLITS = ("train", "val")
LABEL_KEYS = {"cifar10": "labels", "cifar100": "fine_labels"}


class CifarSource:
    """The images of one split of CIFAR; the files are read when the source is opened."""

    def __init__(self, root: Path, *, kind: str, split: str = "train", spec: str | None = None) -> None:
        published = _published(kind)
        self.folder = (root if root.name == published.folder else root / published.folder).resolve()
        self.kind, self.split = kind, split
        self.spec = f"{kind}:{root}?split={split}" if spec is None else spec
        files = published.train if split == "train" else published.val
        self.names = tuple(files)
        self.class_names: tuple[str, ...] | None = read_class_names(self.folder / published.meta, published.meta_key)
        self._pixels: np.ndarray | None
        self._pixels, self.labels, self.counts, sums = self._read()
        self.original = sums == tuple(files.values())
        self.description: Mapping[str, Any] = {"kind": kind, "split": split, "original": self.original}
        self.keys: PackedKeys = pack_keys(self._keys())
        if self.labels.min(initial=0) < 0 or self.labels.max(initial=0) >= len(self.class_names):
            raise Refused(f"{str(self.folder)!r} holds labels outside its {len(self.class_names)} classes")

    @property
    def location(self) -> str:
        return f"{self.kind}:{self.folder}:{self.split}"

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return Sample(self.pixels[i].reshape(3, 32, 32).transpose(1, 2, 0), int(self.labels[i]), self.keys[i])

    @property
    def pixels(self) -> np.ndarray:
        """All images as the files hold them, uint8 [N, 3072]: the red plane, the green, the blue."""
        if self._pixels is None:
            pixels, labels, _, _ = self._read()
            if not np.array_equal(labels, self.labels):
                raise Refused(f"the files in {str(self.folder)!r} changed since they were opened; start again")
            self._pixels = pixels
        return self._pixels

    def stamps(self) -> np.ndarray:
        found = [(self.folder / name).stat() for name in self.names]
        rows = np.array([(file.st_size, file.st_mtime_ns) for file in found], np.int64)
        return np.repeat(rows, self.counts, axis=0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}

    def _keys(self) -> Iterator[str]:
        for name, count in zip(self.names, self.counts, strict=True):
            yield from (f"{self.split}/{name}/{i:05d}" for i in range(count))

    def _read(self) -> tuple[np.ndarray, np.ndarray, list[int], tuple[str, ...]]:
        """Pixels and labels of all files, the number of images in each, and their md5 sums."""
        batches = [read_batch(self.folder / name, LABEL_KEYS[self.kind]) for name in self.names]
        pixels = np.concatenate([batch.pixels for batch in batches])
        labels = np.concatenate([batch.labels for batch in batches])
        return pixels, labels, [len(batch.labels) for batch in batches], tuple(batch.md5 for batch in batches)


def open_cifar(spec: Spec) -> CifarSource:
    """A source from `cifar10:PATH?split=train&download=0` or `cifar100:...`."""
    spec.refuse_unknown({"split", "download"})
    if not spec.name:
        raise UsageError(f"{spec.text!r} names no folder; expected '{spec.scheme}:PATH'")
    split = spec.take("split", "train")
    if split not in SPLITS:
        raise UsageError(f"{spec.text!r}: split={split!r} is neither 'train' nor 'val'")
    root = Path(spec.name).expanduser()
    if spec.take("download", False):
        _download(root, _published(spec.scheme))
    return CifarSource(root, kind=spec.scheme, split=split, spec=spec.text)


# -- what torchvision publishes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Published:
    """Names and md5 sums of the files of one of the two sets, from the class attributes of torchvision."""

    folder: str
    train: Mapping[str, str]
    val: Mapping[str, str]
    meta: str
    meta_key: str
    url: str
    archive: str
    archive_md5: str


def _published(kind: str) -> _Published:
    from torchvision import datasets  # here: it takes seconds to load, and only these sets need it

    known = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    return _Published(
        folder=known.base_folder,
        train=dict(known.train_list),
        val=dict(known.test_list),
        meta=known.meta["filename"],
        meta_key=known.meta["key"],
        url=known.url,
        archive=known.filename,
        archive_md5=known.tgz_md5,
    )


def _download(root: Path, published: _Published) -> None:
    """Let torchvision fetch and unpack its archive below `root`, if any file is missing there."""
    from torchvision.datasets.utils import download_and_extract_archive

    root = root.parent if root.name == published.folder else root
    files = (*published.train, *published.val, published.meta)
    if all((root / published.folder / name).is_file() for name in files):
        return
    try:
        download_and_extract_archive(published.url, root, filename=published.archive, md5=published.archive_md5)
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        raise Refused(
            f"{published.url} could not be downloaded to {str(root)!r}: {one_line(error)}; "
            f"put {published.folder!r} there by hand, or try again"
        ) from error
