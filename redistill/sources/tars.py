"""The samples of one tar file; `redistill.sources.wds` says what is read and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from redistill_cache.errors import Damaged, Refused
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.stamps import cache_folder
from redistill_cache.wording import one_line

from redistill.sources.base import NO_LABEL
from redistill.sources.keeping import keep, settled, take_up

__all__ = ["IMAGES", "TarSamples", "pread", "samples_of", "stamp_of"]

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
