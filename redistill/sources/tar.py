"""The members of a tar that nobody vouches for: names, offsets and sizes, from its headers alone.

tarfile reads an extended header whole, whatever its size, and one inside the other; and it takes a damaged header for
the end. Here the headers that precede a member are few and small, and only a block of zeros ends a tar.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from redistill_cache.errors import Refused
from redistill_cache.wording import one_line

__all__ = ["Member", "members"]

BLOCK = tarfile.BLOCKSIZE
PIECE = 1 << 20
# Honest tars have one to four extended headers before a member, with names of at most 4096 bytes and some attributes.
MAX_EXTENDED_BYTES = 1 << 18
MAX_EXTENDED = 16
LONG_NAME, LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
PAX, GLOBAL_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE
MAX_DIGITS = 20


class Member(NamedTuple):
    """A plain file in a tar: where its bytes are."""

    name: str
    offset: int
    size: int


def members(tar: Path, shown: str | None = None) -> Iterator[Member]:
    """The plain files of a tar, up to its end mark. Folders are skipped, other members refused."""
    shown = repr(str(tar)) if shown is None else shown
    try:
        with tar.open("rb") as file:
            yield from _members(file, shown)
            _check_rest(file)
    except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
        raise Refused(f"{shown} is not a tar, truncated or damaged: {one_line(error)}; get it again") from error


def _members(file: BinaryIO, shown: str) -> Iterator[Member]:
    changes: dict[str, str] = {}  # what the extended headers say of the next member
    extended = 0
    while True:
        try:
            header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros
            if extended:
                raise tarfile.ReadError("it ends after an extended header") from None
            return
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("the end mark is missing") from None
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"a damaged header ({error})") from None
        if header.size < 0:
            raise tarfile.ReadError(f"{header.name[:100]!r} has a negative size")
        if header.type in (LONG_NAME, LONG_LINK, GLOBAL_PAX, *PAX):
            extended += 1
            if header.size > MAX_EXTENDED_BYTES or extended > MAX_EXTENDED:
                raise Refused(
                    f"{shown}: {header.size} bytes in the extended header number {extended} before a member; expected "
                    f"at most {MAX_EXTENDED} of at most {MAX_EXTENDED_BYTES} bytes; pack the tar again"
                )
            changes |= _changes(header.type, _read(file, header.size))
            continue
        extended = 0
        name = changes.get("path", header.name)
        size = int(changes["size"]) if "size" in changes else header.size
        sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in changes)
        changes = {}
        if header.isdir():
            continue
        if not header.isreg() or sparse:
            raise Refused(f"{name[:1000]!r} in {shown} is a link or a special file; expected plain files only")
        yield Member(name, file.tell(), size)
        file.seek(_padded(size), 1)


def _changes(kind: bytes, content: bytes) -> dict[str, str]:
    """What an extended header says of members: 'path' and 'size', and whether they are sparse."""
    if kind == LONG_NAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    if kind == LONG_LINK:
        return {}
    result = {}
    while content.strip(b"\0"):
        digits, space, _ = content[: MAX_DIGITS + 1].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = content[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if not equals or content[length - 1 : length] != b"\n":
            raise tarfile.ReadError("a record of an extended header is damaged")
        name = key.decode("utf-8", "surrogateescape")
        if name in ("path", "size") or name.startswith("GNU.sparse."):
            if kind == GLOBAL_PAX:
                raise tarfile.ReadError(f"a global header sets {name!r} of all members")
            result[name] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    size = result.get("size", "0")
    if not (size.isascii() and size.isdigit() and len(size) <= MAX_DIGITS):
        raise tarfile.ReadError("an extended header has an invalid size")
    return result


def _read(file: BinaryIO, size: int) -> bytes:
    content = file.read(_padded(size))
    if len(content) < _padded(size):
        raise tarfile.ReadError("it ends within an extended header")
    return content[:size]


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_rest(file: BinaryIO) -> None:
    """Check that only zeros follow the block of zeros that ends a tar. Holes of a sparse file are not read."""
    with suppress(OSError):  # the end: no data follows
        while (start := os.lseek(file.fileno(), file.tell(), os.SEEK_DATA)) >= 0:
            file.seek(start)
            piece = file.read(PIECE)
            if not piece:
                return
            if piece.count(0) != len(piece):
                raise tarfile.ReadError("more data after the end mark")
