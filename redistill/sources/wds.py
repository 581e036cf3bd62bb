"""`wds:PATTERN`: tar files as webdataset writes them, read where they lie.

* PATTERN is a tar, or several by braces as in 'train-{000..146}.tar', or a folder (its *.tar by name); local paths or
  http(s) addresses without a '?'. Never 'pipe:' and never a shell; webdataset itself is not loaded. Tars are not
  extracted, and names inside are only names: nothing on the disk is ever opened by one.
* The members of a sample lie next to each other and share a key: the whole name up to the first dot of its last part,
  folders included ('a.b/0001.jpg' has the key 'a.b/0001'). What follows that dot says what a member is:
  jpg jpeg png webp    the image, exactly one to a sample
  cls                  the label, a whole number in ASCII
  json                 the label where there is no cls: the field 'cls', 'label' or 'class' of an object, a whole number
  anything else, pickles among it, is never read, and neither are names without such a dot.
* A sample with a label but no image, or an image but no label, is refused by its key; `?labels=none` reads no labels
  and gives each image the label -1. There are no class names. A key that comes twice is refused, as are members of one
  key with another between them.
* Folders are passed over; links, devices, sparse files and whatever else a tar may hold are refused by name.
* A tar without its end mark, or with anything but zeros after it, is refused: it is cut short, damaged, or two tars
  in one file, of which other readers would silently see only the first. Compressed tars are refused.
* A remote tar is downloaded once, whole, into `tars` in the user's cache folder ($XDG_CACHE_HOME/redistill, by default
  ~/.cache/redistill), checked against the length the server announced, and from then on read there without asking the
  server again; delete the file to fetch it anew.
* The headers of a tar are read once and kept in the user's cache folder while its size and modification time stay;
  samples are then read by offset, in any order.
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import braceexpand  # webdataset's own
import numpy as np
from redistill_cache.errors import Refused, UsageError
from redistill_cache.keys import PackedKeys, pack_keys

from redistill.sources.base import Sample
from redistill.sources.images import MAX_ENCODED_BYTES, BadImage
from redistill.sources.pairing import repeats
from redistill.sources.remote import is_remote, local_copy
from redistill.sources.tars import IMAGES, pread, samples_of, stamp_of
from redistill.specs import Spec

__all__ = ["WdsSource", "open_wds"]


class WdsSource:
    """The samples of some tars; their headers are read when it is opened, images one by one when asked for."""

    class_names: tuple[str, ...] | None = None

    def __init__(self, tars: list[Path], *, labelled: bool = True, spec: str | None = None) -> None:
        self.tars = [_existing(tar).resolve() for tar in tars]
        self.spec = f"wds:{','.join(map(str, tars))}" if spec is None else spec
        self.description = {"kind": "wds"}
        found = [samples_of(tar, labelled=labelled) for tar in self.tars]
        self._opened_as = [samples.stamp for samples in found]
        self.keys: PackedKeys = pack_keys(chain.from_iterable(samples.keys for samples in found))
        if not len(self.keys):
            raise Refused(f"{self.spec!r} holds no images: expected members that end in .{' .'.join(IMAGES)}")
        table = np.concatenate([samples.places for samples in found])
        self._offsets, self._sizes, self.labels = (np.ascontiguousarray(column) for column in table.T)
        counts = [len(samples) for samples in found]
        self._tar_of = np.repeat(np.arange(len(self.tars), dtype=np.int32), counts)
        twice = repeats(self.keys.hashes())
        if len(twice):
            key, tar = self.keys[int(twice[0])], self.tars[self._tar_of[twice[0]]]
            raise Refused(f"the key {key!r} in {str(tar)!r} is in an earlier tar, too; keys must differ across tars")

    @property
    def location(self) -> str:
        return "wds:" + "\0".join(map(str, self.tars))

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, i: int) -> Sample:
        key, place = self.keys[i], int(self._tar_of[i])
        return Sample(self._read(place, int(self._offsets[i]), int(self._sizes[i]), key), int(self.labels[i]), key)

    def stamps(self) -> np.ndarray:
        rows = np.array([stamp_of(tar) for tar in self.tars], np.int64)
        return rows[self._tar_of]

    def _read(self, place: int, offset: int, size: int, key: str) -> bytes:
        tar = self.tars[place]
        if size > MAX_ENCODED_BYTES:
            raise BadImage(key, f"{size} bytes, more than the limit of {MAX_ENCODED_BYTES}")
        try:
            fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = os.fstat(fd)
                if (found.st_size, found.st_mtime_ns) != self._opened_as[place]:
                    raise Refused(f"{str(tar)!r} changed since it was opened; start again")
                return pread(fd, offset, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise BadImage(key, f"{str(tar)!r}: {error.strerror or error}") from error


def open_wds(spec: Spec) -> WdsSource:
    """A source from `wds:PATTERN?labels=none`."""
    spec.refuse_unknown({"labels"})
    labels = spec.take("labels", "members")
    if labels not in ("members", "none"):
        raise UsageError(f"{spec.text!r}: labels={labels!r} is neither 'members' nor 'none'")
    tars = [local_copy(name) if is_remote(name) else Path(name).expanduser() for name in _expand(spec)]
    return WdsSource(tars, labelled=labels == "members", spec=spec.text)


# -- which tars -------------------------------------------------------------------------------------------------------


def _expand(spec: Spec) -> list[str]:
    """Paths and addresses the pattern stands for."""
    if not spec.name:
        raise UsageError(f"{spec.text!r} names no tar; expected something like 'wds:train-{{000..146}}.tar'")
    folder = Path(spec.name).expanduser()
    if folder.is_dir():
        tars = sorted(str(tar) for tar in folder.glob("*.tar"))
        if not tars:
            raise Refused(f"no *.tar in {str(folder)!r}")
        return tars
    try:
        names: list[str] = list(braceexpand.braceexpand(spec.name))
    except ValueError as error:
        raise UsageError(f"{spec.text!r}: {error}; expected braces such as '{{000..146}}'") from error
    for name in names:
        scheme = name.strip().partition(":")[0].lower()
        if scheme == "pipe" or ("://" in name and scheme not in ("http", "https")):
            raise UsageError(f"{spec.text!r}: {scheme}: is not read; expected local paths or http(s) addresses")
    if len(set(names)) < len(names):
        raise UsageError(f"{spec.text!r} names the same tar twice")
    return names


def _existing(tar: Path) -> Path:
    if not tar.is_file():
        raise Refused(f"{str(tar)!r} is not there, or not a file; expected a tar")
    if not os.access(tar, os.R_OK):
        raise Refused(f"{str(tar)!r} cannot be read: permission denied")
    return tar
