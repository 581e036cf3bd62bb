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

import hashlib
import json
import os
import tarfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np
from redistill_cache.errors import Damaged, Refused, UsageError
from redistill_cache.fetching import pull
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.storage import LEFTOVER, LOCAL, disk_trouble
from redistill_cache.verified_files import cache_folder
from redistill_cache.wording import one_line

from redistill.sources.base import NO_LABEL, Sample
from redistill.sources.images import MAX_ENCODED_BYTES, BadImage
from redistill.sources.index import keep, repeats, settled, take_up
from redistill.specs import Spec

__all__ = [
    "IMAGES",
    "TarSamples",
    "WdsSource",
    "is_remote",
    "local_copy",
    "open_wds",
    "pread",
    "samples_of",
    "stamp_of",
]


# -- remote -----------------------------------------------------------------------------------------------------------
#
# Remote files are downloaded once, whole, into the user's cache folder, and read there from then on.


def is_remote(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def local_copy(address: str) -> Path:
    """The file of an http(s) address; it is fetched if it is not there yet."""
    digest = hashlib.sha256(address.encode()).hexdigest()[:32]
    target = cache_folder() / "tars" / f"{digest}-{PurePosixPath(address).name[-100:]}"
    if not target.is_file():
        with disk_trouble("write", target):
            LOCAL.make_directories(target.parent)
            _download(address, target)
    return target


def _download(address: str, target: Path) -> None:
    """Stream `address` into a temporary file beside `target`; it gets the name once it is whole."""
    partial = target.with_name(f"{target.name[:100]}.{uuid.uuid4().hex}{LEFTOVER}")
    try:
        with partial.open("xb") as file:
            pull(address, file)
        LOCAL.sync_file(partial)
        LOCAL.rename(partial, target)
        LOCAL.sync_directory(target.parent)
    finally:
        partial.unlink(missing_ok=True)


# -- tars -------------------------------------------------------------------------------------------------------------
#
# The samples of one tar file; `redistill.sources.wds` says what is read and what is refused.

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json")
JSON_FIELDS = ("cls", "label", "class")
MAX_LABEL_BYTES = 16 << 20
MAX_LABEL = 1 << 31
COPY_BYTES = 1 << 20
SCAN_VERSION = 1
# What tarfile raises on bytes that are not a tar.
TARFILE_RAISES = (tarfile.TarError, ValueError, LookupError, OverflowError, EOFError, MemoryError, OSError)


@dataclass(frozen=True)
class TarSamples:
    """The samples of a tar, in its order."""

    keys: PackedKeys
    places: np.ndarray  # [n, 3] int64: where the image begins, its bytes, its label
    stamp: tuple[int, int]  # of the tar when it was read: size and modification time

    def __len__(self) -> int:
        return len(self.keys)


def samples_of(tar: Path, *, labelled: bool) -> TarSamples:
    """What a tar holds: from its headers, or, while size and modification time stay, from what was kept of them."""
    stamp, started = stamp_of(tar), time.time_ns()
    name = f"{SCAN_VERSION} {labelled} {tar}"
    path = cache_folder() / "tar-headers" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"
    kept = _kept(path, stamp)
    if kept is not None:
        return kept
    found = _scan(tar, labelled)
    samples = TarSamples(pack_keys(key for key, _ in found), _table([place for _, place in found]), stamp)
    row = np.array([stamp], np.int64)
    if settled(row, started).all() and stamp_of(tar) == stamp:
        keep(path, stamp=row, key_data=samples.keys.data, key_offsets=samples.keys.offsets, places=samples.places)
    return samples


def stamp_of(tar: Path) -> tuple[int, int]:
    """Size and modification time; -1 where there is no such file."""
    try:
        found = tar.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _kept(path: Path, stamp: tuple[int, int]) -> TarSamples | None:
    kept = take_up(path, ("stamp", "key_data", "key_offsets", "places"))
    if kept is None or kept["stamp"].tolist() != [list(stamp)]:
        return None
    try:
        keys = PackedKeys(kept["key_data"], kept["key_offsets"])
    except (Damaged, ValueError, TypeError):
        return None
    places = kept["places"]
    return TarSamples(keys, places, stamp) if places.shape == (len(keys), 3) and places.dtype == np.int64 else None


def _table(places: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array(places, np.int64).reshape(-1, 3)


def _scan(tar: Path, labelled: bool) -> list[tuple[str, tuple[int, int, int]]]:
    """Key and place of every sample."""
    found, incomplete = [], None
    for group in filter(_Group.matters, _groups(tar, labelled)):
        try:
            found.append((group.key, group.place(tar, labelled)))
        except Refused as error:  # members that lie apart explain it better, if the scan finds any
            incomplete = incomplete or error
    if incomplete is not None:
        raise incomplete
    return found


@dataclass
class _Group:
    """Members next to each other that share a key: offset and size by extension, content of the labels."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    label_bytes: dict[str, bytes] = field(default_factory=dict)

    def matters(self) -> bool:
        """Whether this is a sample at all; a README is not."""
        return any(extension in self.members for extension in (*IMAGES, *LABELS))

    def place(self, tar: Path, labelled: bool) -> tuple[int, int, int]:
        """Offset and size of the image, and the label."""
        images = [extension for extension in IMAGES if extension in self.members]
        if len(images) != 1:
            found = f"{len(images)} images ({', '.join(images)})" if images else "no image"
            raise Refused(f"the sample {self.key!r} in {str(tar)!r} has {found}; expected one of {', '.join(IMAGES)}")
        return (*self.members[images[0]], self._label(tar) if labelled else NO_LABEL)

    def _label(self, tar: Path) -> int:
        where = f"the sample {self.key!r} in {str(tar)!r}"
        label: object = None
        try:
            if "cls" in self.label_bytes:
                label = int(self.label_bytes["cls"].decode("ascii"))
            elif "json" in self.label_bytes:
                fields = json.loads(self.label_bytes["json"])
                if isinstance(fields, dict):
                    label = next((fields[name] for name in JSON_FIELDS if name in fields), None)
        except (ValueError, RecursionError) as error:
            raise Refused(f"{where} has a label that cannot be read: {' '.join(str(error).split())[:100]}") from error
        if label is None:
            raise Refused(f"{where} has no label: expected 'cls', or 'json' with 'cls'; or add '?labels=none'")
        if type(label) is not int or not 0 <= label < MAX_LABEL:
            raise Refused(f"{where} has the label {str(label)[:50]!r}; expected a whole number from 0")
        return label


def _groups(tar: Path, labelled: bool) -> Iterator[_Group]:
    """The samples of one tar in order."""
    seen: set[str] = set()
    group = None
    with tar.open("rb") as file:
        for member in _members(tar):
            key, extension = _split(member.name, tar)
            if not extension:
                continue
            if group is None or key != group.key:
                if group is not None:
                    yield group
                if key in seen:
                    raise Refused(f"the members of {key!r} in {str(tar)!r} do not lie together; pack the tar again")
                seen.add(key)
                group = _Group(key)
            if extension in group.members:
                raise Refused(f"{member.name!r} is in {str(tar)!r} twice; pack the tar again")
            group.members[extension] = member.offset_data, member.size
            if labelled and extension in LABELS:
                group.label_bytes[extension] = _label_bytes(file.fileno(), member, tar)
    if group is not None:
        yield group


def _label_bytes(fd: int, member: tarfile.TarInfo, tar: Path) -> bytes:
    if member.size > MAX_LABEL_BYTES:
        raise Refused(f"{member.name!r} in {str(tar)!r} has {member.size} bytes, too many for a label")
    try:
        return pread(fd, member.offset_data, member.size)
    except OSError as error:
        raise Refused(f"{str(tar)!r} is cut short at {member.name!r}; get it again") from error


def _split(name: str, tar: Path) -> tuple[str, str]:
    """Key and lower-case extension; no extension for what is not part of a sample (hidden files, names with no dot)."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or not extension:
        return "", ""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Refused(f"the name {name!r} in {str(tar)!r} is not UTF-8; pack the tar again") from None
    return folder + slash + stem, extension.lower()


def _members(tar: Path) -> Iterator[tarfile.TarInfo]:
    """The plain files of a tar, to its very end: tarfile alone takes a damaged header for the end."""
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # or it keeps a kilobyte for each
                if member.size < 0 or member.offset_data <= end:
                    raise tarfile.ReadError(f"{member.name!r} has an impossible size or place")
                end = member.offset_data
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise Refused(
                        f"{member.name!r} in {str(tar)!r} is a link or a special file; only plain files are read"
                    )
                yield member
            end = archive.offset
        _check_end(tar, end)
    except TARFILE_RAISES as error:
        raise Refused(f"{str(tar)!r} is not a tar, cut short or damaged: {one_line(error)}; get it again") from error


def _check_end(tar: Path, end: int) -> None:
    """The end mark is a block of zeros, and only zeros follow it."""
    with tar.open("rb") as file:
        file.seek(end)
        first = file.read(tarfile.BLOCKSIZE)
        if len(first) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the end mark is missing")
        for block in chain([first], iter(lambda: file.read(COPY_BYTES), b"")):
            if block.count(0) != len(block):
                raise tarfile.ReadError("a damaged header, or more data after the end mark")


def pread(fd: int, offset: int, size: int) -> bytes:
    """Exactly `size` bytes."""
    parts, left = [], size
    while left:
        part = os.pread(fd, left, offset + size - left)
        if not part:
            raise OSError(f"ends {left} bytes too early")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


# -- wds --------------------------------------------------------------------------------------------------------------


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
    from webdataset.shardlists import expand_urls  # here, because it loads torch

    try:
        names: list[str] = expand_urls(spec.name)
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
