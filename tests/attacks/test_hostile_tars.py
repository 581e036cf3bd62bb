"""Every hostile tar or pattern is refused in one line, within two seconds of CPU time and 200 MB."""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from redistill_cache.errors import RedistillError

import redistill
from tests.attacks.measure import start_peak
from tests.faults.writer_process import context

HUGE = 7 << 30


def header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def huge_header(kind: bytes) -> Callable[[Path], str]:
    """An extended header of 7 GiB, of which the disk holds one block."""

    def build(folder: Path) -> str:
        tar = folder / "a.tar"
        with tar.open("wb") as file:
            file.write(header("x", kind, HUGE))
            file.truncate(HUGE + 4096)
        return f"wds:{tar}"

    return build


def pax(*records: bytes) -> bytes:
    body = b""
    for record in records:
        length = len(record) + 2
        while len(b"%d" % length) + len(record) + 2 != length:
            length += 1
        body += b"%d %s\n" % (length, record)
    return header("x", tarfile.XHDTYPE, len(body)) + body.ljust(-(-len(body) // 512) * 512, b"\0")


def many_headers(folder: Path) -> str:
    tar = folder / "a.tar"
    tar.write_bytes(pax(b"comment=x") * 20_000 + bytes(1024))
    return f"wds:{tar}"


def endless_map(folder: Path) -> str:
    """A sparse member whose map of 10**9 entries must be looked for in 7 GiB of zeros."""
    tar = folder / "a.tar"
    with tar.open("wb") as file:
        file.write(pax(b"GNU.sparse.major=1", b"GNU.sparse.minor=0"))
        file.write(header("1.png", tarfile.REGTYPE, HUGE))
        file.truncate(HUGE)
    return f"wds:{tar}"


def many_links(folder: Path) -> str:
    tar = folder / "a.tar"
    tar.write_bytes(header("x", tarfile.GNUTYPE_LONGLINK, 512) * 20_000 + bytes(1024))
    return f"wds:{tar}"


def hole_at_the_end(folder: Path) -> str:
    """Eight tebibytes of nothing after the end mark, then a byte."""
    tar = folder / "a.tar"
    with tar.open("wb") as file:
        file.write(bytes(1024))
        file.seek(1 << 43)
        file.write(b"x")
    return f"wds:{tar}"


def pattern(text: str) -> Callable[[Path], str]:
    return lambda folder: f"wds:{text}"


ATTACKS: dict[str, tuple[Callable[[Path], str], str]] = {
    "pax header of 7 GiB": (huge_header(tarfile.XHDTYPE), "extended header"),
    "global pax header of 7 GiB": (huge_header(tarfile.XGLTYPE), "extended header"),
    "long name of 7 GiB": (huge_header(tarfile.GNUTYPE_LONGNAME), "extended header"),
    "long link of 7 GiB": (huge_header(tarfile.GNUTYPE_LONGLINK), "extended header"),
    "20,000 pax headers": (many_headers, "extended header number 17"),
    "20,000 long links": (many_links, "extended header number 17"),
    "sparse map without an end": (endless_map, "special file"),
    "a hole of 8 TiB at the end": (hole_at_the_end, "more data after the end mark"),
    "a hundred million numbers": (pattern("{0..99999999}.tar"), "stands for more than 100000 tars"),
    "numbers of a thousand digits": (pattern("{0..1" + "0" * 1000 + "}.tar"), "stands for more than 100000 tars"),
    "a product of twelve braces": (pattern("{0..9}" * 12), "stands for more than 100000 tars"),
    "a product inside braces": (pattern("{a,b{0..9}" + "{0..9}" * 11 + "}"), "stands for more than 100000 tars"),
    "a sum of many ranges": (pattern("::".join(["{0..9999}"] * 20)), "stands for more than 100000 tars"),
    "3,000 nested braces": (pattern("{" * 3000 + "a,b" + "}" * 3000), "braces inside each other"),
    "nested lists": (pattern("{a," * 3000 + "}" * 3000), "braces inside each other"),
}


def measure(text: str, cache: Path, parent: Connection) -> None:
    """The body of a process."""
    import webdataset.shardlists  # noqa: F401  counted before: it imports torch

    os.environ["XDG_CACHE_HOME"] = str(cache)
    peak, start = start_peak(), time.process_time()
    try:
        redistill.open_source(text)
        result = "accepted"
    except RedistillError as error:
        result = str(error)
    parent.send((result, time.process_time() - start, peak()))


@pytest.mark.parametrize("name", ATTACKS)
def test_refused_within_limits_of_time_and_memory(tmp_path: Path, name: str):
    build, reason = ATTACKS[name]
    ours, theirs = context().Pipe(duplex=False)
    process = context().Process(target=measure, args=(build(tmp_path), tmp_path / "cache", theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(200), "stuck"
        result, seconds, megabytes = ours.recv()
    finally:
        process.kill()
        process.join()
    assert reason in result
    assert "\n" not in result
    assert len(result) < 1000
    assert seconds < 2
    assert megabytes < 200
