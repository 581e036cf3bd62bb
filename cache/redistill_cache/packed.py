"""The packed form of an archive: few files, for hosts that count them. FORMAT.md has it as an appendix.

    name.redistill/
      manifest.json       the manifest of the archive, byte for byte
      base.tar            everything that is not of one view
      view-0000.tar ...   shards and commit records of one view; of several where there are more than 90

The manifest alone determines every byte of these tars but the files in them. So a reader never interprets a tar: it
knows where each file begins, compares the header before it with the one that must be there, and checks the file like
any other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from redistill_cache import layout
from redistill_cache.addresses import split_pin
from redistill_cache.download import FileSink
from redistill_cache.errors import Damaged
from redistill_cache.journal import FileEntry

__all__ = ["END", "MANIFEST", "SIGNATURE", "TarSink", "contents", "header", "is_packed", "padding", "tar_size"]

MANIFEST = "manifest.json"
SIGNATURE = f"{MANIFEST}.sig"
BASE = "base.tar"
MOST_TARS = 90  # of views: some hosts take less than 100 files
BLOCK = 512
END = bytes(2 * BLOCK)
LONGEST_NAME, MOST_BYTES = 100, 8**11 - 1  # in a header of one block
EXTENDED_NAME = "././@PaxHeader"
SMALL_GAP = 1 << 18  # bytes that are received and dropped, rather than asking once more


def is_packed(location: object) -> bool:
    """Whether a path, which may end with '#sha256=ID', is a folder with an archive in packed form."""
    path = Path(split_pin(str(location))[0])
    return (path / MANIFEST).is_file() and not (path / "zarr.json").exists()


def contents(files: Iterable[str], views: int) -> dict[str, list[str]]:
    """The tars of an archive with this number of views, and the files in each, in order."""
    per_tar = -(-views // MOST_TARS)
    tars: dict[str, list[str]] = {BASE: []}
    of_views: dict[int, list[str]] = {}
    for name in sorted(files):
        view = layout.view_of_file(name)
        (tars[BASE] if view is None else of_views.setdefault(view // per_tar * per_tar, [])).append(name)
    return tars | {f"view-{first:04d}.tar": of_views[first] for first in sorted(of_views)}


def header(name: str, size: int) -> bytes:
    """What is before a file in a tar: POSIX, with an extended header where name or size need one."""
    records = [("path", name)] if len(name) > LONGEST_NAME else []
    records += [("size", str(size))] if size > MOST_BYTES else []
    extended = b"".join(_record(*record) for record in records)
    before = _header_block(EXTENDED_NAME, len(extended), "x") + extended + padding(len(extended)) if records else b""
    return before + _header_block(name[:LONGEST_NAME], size if size <= MOST_BYTES else 0, "0")


def _header_block(name: str, size: int, kind: str) -> bytes:
    before = f"{'0000644':\0<8}{'0000000':\0<8}{'0000000':\0<8}{size:011o}\0{0:011o}\0"  # mode, owners, size, time
    after = f"{kind}{'':\0<100}ustar\00000"
    total = sum(f"{name}{before}{after}".encode()) + 8 * ord(" ")  # the checksum counts as blanks
    return f"{name:\0<100}{before}{total:06o}\0 {after}".encode("ascii").ljust(BLOCK, b"\0")


def _record(key: str, value: str) -> bytes:
    """A record of an extended header, which begins with its own length."""
    length = len(f" {key}={value}\n")
    length += len(str(length + len(str(length))))
    return f"{length} {key}={value}\n".encode("ascii")


def header_bytes(name: str, size: int) -> int:
    return BLOCK if len(name) <= LONGEST_NAME and size <= MOST_BYTES else 3 * BLOCK


def padding(size: int) -> bytes:
    """What is after a file in a tar."""
    return bytes(-size % BLOCK)


def tar_size(files: Mapping[str, FileEntry], names: Iterable[str]) -> int:
    sizes = ((name, files[name].size) for name in names)
    return sum(header_bytes(name, size) + size + len(padding(size)) for name, size in sizes) + len(END)


@dataclass(frozen=True)
class Member:
    """A file in a tar that is wanted."""

    name: str
    entry: FileEntry
    start: int
    """Of its header."""
    body: int
    stop: int


class TarSink:
    """Takes some files out of a tar that is received. `open_file` gives the place for each."""

    verifies = True

    def __init__(
        self,
        files: Mapping[str, FileEntry],
        names: Iterable[str],
        wanted: Collection[str],
        open_file: Callable[[str], FileSink],
    ) -> None:
        self._members: list[Member] = []
        position = 0
        for name in names:
            entry = files[name]
            body = position + header_bytes(name, entry.size)
            stop = body + entry.size
            if name in wanted:
                self._members.append(Member(name, entry, position, body, stop))
            position = stop + len(padding(entry.size))
        self._open_file = open_file
        self._index = 0
        self._begin()

    def _begin(self) -> None:
        """The next file."""
        self._file: FileSink | None = None
        if self.done:
            return
        member = self._members[self._index]
        self._position, self._header = member.start, header(member.name, member.entry.size)
        self._last = self._index
        while self._last + 1 < len(self._members):
            gap = self._members[self._last + 1].start - self._members[self._last].stop
            if gap > SMALL_GAP:
                break
            self._last += 1

    @property
    def done(self) -> bool:
        return self._index == len(self._members)

    @property
    def wanted(self) -> tuple[int, int | None]:
        return (self.end, self.end) if self.done else (self._position, self._members[self._last].stop)

    @property
    def end(self) -> int:
        return self._members[-1].stop

    def announced(self, length: int) -> None:
        if length < self.end:
            raise Damaged(f"has {length} bytes, too few for the files that its manifest lists; it is damaged")

    def restart(self) -> None:
        if not self.done:
            self._position = self._members[self._index].start
            if self._file is not None:
                self._file.restart()

    def take(self, position: int, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest and not self.done:
            unwanted = min(len(rest), self._position - position)
            count = unwanted or self._take(rest)
            position, rest = position + count, rest[count:]

    def _take(self, piece: memoryview) -> int:
        """Header or content of the current file, as far as they are in these bytes."""
        member, position = self._members[self._index], self._position
        if position < member.body:
            expected = self._header[position - member.start :][: len(piece)]
            if piece[: len(expected)] != expected:
                raise Damaged(f"does not have {member.name} where its manifest says; it is damaged or was edited")
            count = len(expected)
        else:
            if self._file is None:
                self._file = self._open_file(member.name)
            count = min(len(piece), member.stop - position)
            self._file.take(position - member.body, bytes(piece[:count]))
        self._position += count
        if self._position == member.stop:
            self._file = self._file or self._open_file(member.name)  # an empty file
            try:
                self._file.ended()
            except Damaged as error:
                raise Damaged(f"{member.name}: {error}") from None
            self._index += 1
            self._begin()
        return count

    def ended(self) -> None:
        if not self.done:
            raise Damaged(f"ends before {self._members[self._index].name}; it is damaged")
