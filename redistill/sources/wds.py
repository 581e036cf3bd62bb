"""`wds:PATTERN`: tar files in webdataset's layout, read in place.

* PATTERN is a folder (its *.tar by name), a list file (LIST.txt with one tar in a line, '#' before a comment), or one
  or more tars: paths or addresses (http(s), s3, gs, hf) without a '?', separated by '::', with braces as in
  'train-{000..146}.tar' or '{a,b}.tar'; at most 100,000 in all. `${NAME}` is replaced by the environment variable
  WDS_NAME. This is webdataset's own expansion, so a name that contains one of these can be reached
  only through its folder (or, for braces, with a backslash before them), and an IPv6 address with '::' not at all.
  'pipe:' is refused and no shell ever runs. Tars are not extracted, and no file on disk is opened by a name from inside
  a tar.
* The members of a sample are adjacent and share a key: the whole name up to the first dot of its last part, folders
  included ('a.b/0001.jpg' has the key 'a.b/0001'). The rest, after that dot, is the kind of the member:
  jpg jpeg png webp    the image, exactly one per sample
  cls                  the label, an integer in ASCII
  json                 the label if there is no cls: the field 'cls', 'label' or 'class' of an object, an integer
  anything else, pickles included, is never read; nor are names without such a dot.
* A sample with a label but no image, or an image but no label, is refused by its key; `?labels=none` reads no labels
  and gives every image the label -1. There are no class names. Repeated keys are refused, as are members of one key
  that are not adjacent.
* Folders are skipped; links, devices, sparse files and other special members are refused by name.
* A tar without its end mark, or with anything but zeros after it, is refused: it is truncated, damaged, or two tars
  in one file, of which other readers silently read only the first. Compressed tars are refused.
* A remote tar that is not streamed (see `stream`) is downloaded once, as a whole, into `tars` in the user's cache
  folder ($XDG_CACHE_HOME/redistill, by default ~/.cache/redistill), checked against the length that the server
  announced and up to its end mark, and from then on read there without contacting the server; delete the file to
  download it again.
* The headers of a tar are read once and cached while its size and modification time stay the same; samples are then
  read by offset, in any order.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from redistill_cache.addresses import Address, is_address, parse_address
from redistill_cache.errors import Damaged, Refused, UsageError
from redistill_cache.fetching import fetch_file
from redistill_cache.keys import PackedKeys, pack_keys
from redistill_cache.strict_json import Fields
from redistill_cache.verified_files import cache_folder
from redistill_cache.wording import one_line

from redistill.interrupts import stop_requested
from redistill.sources.base import (
    NO_FILE,
    NO_LABEL,
    FileStamp,
    Sample,
    file_stamp,
    local_path,
)
from redistill.sources.images import MAX_ENCODED_BYTES, BadImage
from redistill.sources.index import load_arrays, old_enough, repeats, save_arrays
from redistill.sources.tar import Member, members
from redistill.sources.tar_cache import name_of
from redistill.specs import Spec

__all__ = ["WdsSource", "copy_path", "expand_pattern", "local_copy", "parse_place", "read_at", "scan_tar"]

IMAGES = ("jpg", "jpeg", "png", "webp")
LABELS = ("cls", "json")
JSON_FIELDS = ("cls", "label", "class")
MAX_LABEL_BYTES = 16 << 20
MAX_LABEL = (1 << 31) - 1
SCAN_VERSION = 1
MAX_TARS = 100_000
MAX_LIST_BYTES = 64 << 20
MAX_BRACES = 32  # inside each other
MAX_UNANNOUNCED_BYTES = 16 << 30


class WdsSource:
    """The samples of some tars; headers are read when it is opened, images one by one."""

    class_names: tuple[str, ...] | None = None

    def __init__(
        self,
        tars: list[Path],
        *,
        labelled: bool = True,
        max_pixels: int | None = None,
        index_file: Path | None = None,
        window: int = 0,
        spec: str | None = None,
    ) -> None:
        self.window = window
        self.max_pixels, self.index_file = max_pixels, index_file
        self.tars = [_existing(tar).resolve() for tar in tars]
        self.spec = f"wds:{','.join(map(str, tars))}" if spec is None else spec
        self.description = {"kind": "wds"}
        parts = [_samples_of(tar, labelled=labelled) for tar in self.tars]
        self._opened_as = [part.stamp for part in parts]
        self.keys: PackedKeys = pack_keys(chain.from_iterable(part.keys for part in parts))
        if not len(self.keys):
            raise Refused(f"no images in {self.spec!r}: expected members that end in .{' .'.join(IMAGES)}")
        table = np.concatenate([part.places for part in parts])
        self._offsets, self._sizes, self.labels = (np.ascontiguousarray(column) for column in table.T)
        counts = [len(part) for part in parts]
        self.tar_of = np.repeat(np.arange(len(self.tars), dtype=np.int32), counts)
        repeated = repeats(self.keys.hashes())
        if len(repeated):
            key, tar = self.keys[int(repeated[0])], self.tars[self.tar_of[repeated[0]]]
            raise Refused(f"the key {key!r} in {str(tar)!r} is in an earlier tar, too; make keys unique across tars")

    @property
    def location(self) -> str:
        limit = "" if self.max_pixels is None else f"?max_pixels={self.max_pixels}"
        return "wds:" + "\0".join(map(str, self.tars)) + limit

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, i: int) -> Sample:
        key = self.keys[i]
        return Sample(self._read(i, key), int(self.labels[i]), key, self.max_pixels)

    def stamps(self) -> np.ndarray:
        by_tar = np.array([_stamp_of(tar) for tar in self.tars], np.int64)
        return by_tar[self.tar_of]

    @property
    def largest_tar(self) -> int:
        """In bytes."""
        return max(stamp[0] for stamp in self._opened_as)

    def by_parts(self) -> WdsSource:
        return self

    def loaded(self, samples: Sequence[int]) -> WdsSource:
        del samples  # they can be read in any order
        return self

    def forget(self, i: int) -> None:
        """Nothing to do: an index is not used for a tar that has another stamp."""

    def _read(self, i: int, key: str) -> bytes:
        offset, size = int(self._offsets[i]), int(self._sizes[i])
        tar, opened_as = self.tars[self.tar_of[i]], self._opened_as[self.tar_of[i]]
        if size > MAX_ENCODED_BYTES:
            raise BadImage(key, f"{size} bytes, more than the limit of {MAX_ENCODED_BYTES}")
        try:
            fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                if file_stamp(status) != opened_as:
                    raise Refused(f"{str(tar)!r} changed since it was opened; start the run again")
                return read_at(fd, offset, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise BadImage(key, f"{str(tar)!r}: {error.strerror or error}") from error


# -- which tars -------------------------------------------------------------------------------------------------------


def expand_pattern(spec: Spec) -> list[str]:
    """The paths and addresses of a pattern."""
    if not spec.name:
        raise UsageError(f"expected a pattern such as 'wds:train-{{000..146}}.tar', found {spec.text!r}")
    folder = local_path(spec.name)
    if _is_folder(folder):
        tars = sorted(str(tar) for tar in folder.glob("*.tar"))
        if not tars:
            raise Refused(f"no *.tar in {str(folder)!r}")
        return tars
    if spec.name.endswith(".txt"):
        return _checked(_listed(folder), spec)
    from webdataset.shardlists import envsubst, expand_urls  # here, because it imports torch

    try:
        pattern = spec.name
        for _ in range(10):  # a variable may name another one; webdataset follows as many
            pattern = envsubst(pattern)
        _refuse_many(pattern, spec)
        names: list[str] = expand_urls(pattern)
    except (AssertionError, KeyError) as error:  # KeyError where Python runs with -O, without webdataset's assertion
        raise UsageError(
            f"{spec.text!r} needs an environment variable that is not set: '${{NAME}}' stands for the variable WDS_NAME"
        ) from error
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{spec.text!r} has unbalanced braces; expected braces such as '{{000..146}}'") from error
    return _checked(names, spec)


def _listed(file: Path) -> list[str]:
    """The names in a list file; relative ones are beside it."""
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_LIST_BYTES + 1)
        lines = [line.strip() for line in content.decode().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise Refused(f"{str(file)!r}: expected a list of tars, one in a line: {reason}") from error
    if len(content) > MAX_LIST_BYTES:
        raise Refused(f"{str(file)!r} has more than {MAX_LIST_BYTES} bytes; expected a list of tars, one in a line")
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise Refused(f"{str(file)!r} names no tars; expected one in a line")
    # What is refused, such as 'pipe:', stays as it is.
    return [name if re.match(r"[A-Za-z]+:", name) else str(file.parent / local_path(name)) for name in names]


def _checked(names: list[str], spec: Spec) -> list[str]:
    """The names, none of which is empty, occurs twice, or starts a program."""
    if len(names) > MAX_TARS:
        raise _too_many(spec)
    for name in names:
        scheme = name.strip().partition(":")[0].lower()
        if not name.strip():
            raise UsageError(f"{spec.text!r} has an empty name; expected paths or http(s) addresses between '::'")
        if scheme == "pipe":
            raise UsageError(f"{spec.text!r}: {scheme}: is not read; expected local paths or http(s) addresses")
    if len(set(names)) < len(names):
        raise UsageError(f"{spec.text!r} names the same tar twice")
    return names


INTEGERS = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
ANY_INTEGERS = re.compile(r"-?\d+\.\.-?\d+(?:\.\.-?\d+)?")
LETTERS = 52


def _refuse_many(pattern: str, spec: Spec) -> None:
    """Count the names of a pattern before they are made: a short one may stand for any number."""
    total = 0
    for part in pattern.split("::"):
        total += _count(part, spec)
        if total > MAX_TARS:
            raise _too_many(spec)


def _count(pattern: str, spec: Spec) -> int:
    """How many names braceexpand makes of a pattern; ValueError for unbalanced braces, as it raises."""
    outer: list[tuple[int, int, int]] = []  # per open brace: names before the comma, names since, where it is
    before, since, i = 0, 1, 0
    while i < len(pattern):
        letter = pattern[i]
        if letter == "\\":
            i += 1
        elif letter == "{":
            outer.append((before, since, i))
            before, since = 0, 1
            if len(outer) > MAX_BRACES:
                raise _too_deep(spec)
        elif letter == "," and outer:
            before, since = before + since, 1
        elif letter == "}":
            if not outer:
                raise ValueError(pattern)
            names = before + since
            before, since, start = outer.pop()
            since *= max(names, _count_range(pattern[start + 1 : i]))
        if before + since > MAX_TARS:
            raise _too_many(spec)
        i += 1
    if outer:
        raise ValueError(pattern)
    return before + since


def _count_range(text: str) -> int:
    """How many names 'FIRST..LAST..STEP' stands for, at most."""
    integers = INTEGERS.fullmatch(text)
    if integers is not None:
        first, last, step = int(integers[1]), int(integers[2]), int(integers[3] or 1) or 1
        return abs(last - first) // step + 1
    if ANY_INTEGERS.fullmatch(text):
        return MAX_TARS + 1
    return LETTERS if re.fullmatch(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?", text) else 1


def _too_deep(spec: Spec) -> UsageError:
    return UsageError(f"{spec.text[:200]!r} has more than {MAX_BRACES} braces inside each other; write it flatter")


def _too_many(spec: Spec) -> UsageError:
    return UsageError(f"{spec.text[:200]!r} stands for more than {MAX_TARS} tars; split it, or pack larger tars")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a pattern of many tars is too long for a file name
        return False


def _existing(tar: Path) -> Path:
    try:
        is_file = tar.is_file()
    except OSError as error:
        raise Refused(f"{str(tar)!r} cannot be read: {error.strerror or error}") from error
    if not is_file:
        raise Refused(f"expected a tar, found no file {str(tar)!r}")
    if not os.access(tar, os.R_OK):
        raise Refused(f"{str(tar)!r} cannot be read: permission denied")
    return tar


def parse_place(name: str) -> Address | Path:
    return parse_address(name.strip()) if is_address(name) else local_path(name)


def copy_path(address: Address) -> Path:
    """Where the copy of a tar is that is kept."""
    return cache_folder() / "tars" / name_of(address)


def local_copy(address: Address) -> Path:
    """The file of an address in the cache folder; downloaded if it is missing."""
    target = copy_path(address)

    def check(received: Path) -> None:
        """A tar that is truncated or none at all must not stay in the cache."""
        for _ in members(received, f"what {address} sent"):
            pass

    fetch_file(address, target, check, most=MAX_UNANNOUNCED_BYTES, stopped=stop_requested)
    return target


# -- the samples of one tar -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TarSamples:
    """The samples of a tar, in its order."""

    keys: PackedKeys
    places: np.ndarray  # [n, 3] int64: offset and size of the image, and the label
    stamp: FileStamp  # of the tar when it was read

    def __len__(self) -> int:
        return len(self.keys)


def _samples_of(tar: Path, *, labelled: bool) -> _TarSamples:
    """The samples of a tar: from its headers, or from the cache while its stamp stays the same."""
    stamp, started = _stamp_of(tar), time.time_ns()
    name = f"{SCAN_VERSION} {labelled} {tar}"
    path = cache_folder() / "tar-headers" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"
    cached = _load_samples(path, stamp)
    if cached is not None:
        return cached
    keys, places = scan_tar(tar, labelled)
    samples = _TarSamples(pack_keys(keys), np.array(places, np.int64).reshape(-1, 3), stamp)
    row = np.array([stamp], np.int64)
    if old_enough(row, started).all() and _stamp_of(tar) == stamp:
        key_data, key_offsets = samples.keys.data, samples.keys.offsets
        save_arrays(path, stamp=row, key_data=key_data, key_offsets=key_offsets, places=samples.places)
    return samples


def _stamp_of(tar: Path) -> FileStamp:
    try:
        return file_stamp(tar.stat())
    except OSError:
        return NO_FILE


def _load_samples(path: Path, stamp: FileStamp) -> _TarSamples | None:
    """The samples saved for a tar with this stamp, if they can be read."""
    saved = load_arrays(path, ("stamp", "key_data", "key_offsets", "places"))
    if saved is None or saved["stamp"].tolist() != [list(stamp)]:
        return None
    try:
        keys = PackedKeys(saved["key_data"], saved["key_offsets"])
    except (Damaged, ValueError, TypeError):
        return None
    places = saved["places"]
    return _TarSamples(keys, places, stamp) if places.shape == (len(keys), 3) and places.dtype == np.int64 else None


def scan_tar(tar: Path, labelled: bool) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Key and place of every sample."""
    keys, places, incomplete = [], [], None
    for group in filter(_Group.is_sample, _groups(tar, labelled)):
        try:
            places.append(group.place(tar, labelled))
            keys.append(group.key)
        except Refused as error:  # raised later: members that are not adjacent are the better explanation
            incomplete = incomplete or error
    if incomplete is not None:
        raise incomplete
    return keys, places


@dataclass
class _Group:
    """Adjacent members that share a key: offset and size by extension, and the content of the labels."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    label_bytes: dict[str, bytes] = field(default_factory=dict)

    def is_sample(self) -> bool:
        """Whether any member is an image or a label; those of a README are not."""
        return any(extension in self.members for extension in (*IMAGES, *LABELS))

    def place(self, tar: Path, labelled: bool) -> tuple[int, int, int]:
        """Offset and size of the image, and the label."""
        images = [extension for extension in IMAGES if extension in self.members]
        if len(images) != 1:
            actual = f"{len(images)} images ({', '.join(images)})" if images else "no image"
            raise Refused(f"the sample {self.key!r} in {str(tar)!r} has {actual}; expected one of {', '.join(IMAGES)}")
        return (*self.members[images[0]], self._label(tar) if labelled else NO_LABEL)

    def _label(self, tar: Path) -> int:
        where = f"the sample {self.key!r} in {str(tar)!r}"
        try:
            if "cls" in self.label_bytes:
                fields: object = {"cls": int(self.label_bytes["cls"].decode("ascii"))}
            else:
                fields = json.loads(self.label_bytes.get("json", b"null"))
        except (ValueError, RecursionError) as error:
            raise Refused(f"{where} has a label that cannot be read: {one_line(error)[:100]}") from error
        name = next((name for name in JSON_FIELDS if isinstance(fields, dict) and name in fields), None)
        if name is None:
            raise Refused(f"{where} has no label: expected 'cls', or 'json' with 'cls'; or add '?labels=none'")
        return Fields(fields, where).integer(name, 0, MAX_LABEL)


def _groups(tar: Path, labelled: bool) -> Iterator[_Group]:
    """The samples of one tar in order."""
    seen: set[str] = set()
    group = None
    with tar.open("rb") as file:
        for member in members(tar):
            key, extension = _split(member.name, tar)
            if not extension:
                continue
            if group is None or key != group.key:
                if group is not None:
                    yield group
                if key in seen:
                    raise Refused(f"the members of {key!r} in {str(tar)!r} are not adjacent; pack the tar again")
                seen.add(key)
                group = _Group(key)
            if extension in group.members:
                raise Refused(f"{member.name!r} is in {str(tar)!r} twice; pack the tar again")
            group.members[extension] = member.offset, member.size
            if labelled and extension in LABELS:
                group.label_bytes[extension] = _label_bytes(file.fileno(), member, tar)
    if group is not None:
        yield group


def _label_bytes(fd: int, member: Member, tar: Path) -> bytes:
    if member.size > MAX_LABEL_BYTES:
        raise Refused(f"{member.name!r} in {str(tar)!r} has {member.size} bytes; a label has at most {MAX_LABEL_BYTES}")
    try:
        return read_at(fd, member.offset, member.size)
    except OSError as error:
        raise Refused(f"{str(tar)!r} is truncated at {member.name!r}; get it again") from error


def _split(name: str, tar: Path) -> tuple[str, str]:
    """Key and lower-case extension; both empty for names that belong to no sample (hidden, or without a dot)."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or not extension:
        return "", ""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Refused(f"the name {name!r} in {str(tar)!r} is not UTF-8; pack the tar again") from None
    return folder + slash + stem, extension.lower()


def read_at(fd: int, offset: int, size: int) -> bytes:
    """Exactly `size` bytes at `offset`."""
    parts, left = [], size
    while left:
        part = os.pread(fd, left, offset + size - left)
        if not part:
            raise OSError(f"{left} bytes are missing at the end")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
