"""Downloads from servers that go wrong: what passes is tried again, nothing wrong is believed, everything ends."""

from __future__ import annotations

import email.utils
import hashlib
import io
import json
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from redistill_cache import download, fetch_archive, packed, protocols
from redistill_cache.addresses import parse_address
from redistill_cache.download import FileSink, Transfer, Unreachable
from redistill_cache.errors import Damaged, RedistillError, Refused, UsageError
from redistill_cache.journal import FileEntry
from redistill_cache.packing import pack

from tests.flaky_server import FAULTS, PASSING, Flaky, Request, serving
from tests.tiny_archive import contents

DATA = random.Random(7).randbytes(300_000)
ENTRY = FileEntry(len(DATA), hashlib.sha256(DATA).hexdigest())


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "WAIT_S", 0.01)
    monkeypatch.setattr(download, "LONGEST_WAIT_S", 0.05)


@contextmanager
def faults(*names: str | None, **options: object) -> Iterator[Flaky]:
    """A server whose first requests have these faults."""
    flaky = Flaky({"a": DATA}, lambda number, _: names[number] if number < len(names) else None, **options)
    with serving(flaky):
        yield flaky


def receive(flaky: Flaky, expected: FileEntry | None = ENTRY, notify: Callable[[str], None] = print) -> bytes:
    file = io.BytesIO()
    sink = FileSink(file, len(DATA), expected=expected)
    download.download([Transfer(parse_address(f"{flaky.address}/a"), sink)], notify=notify)
    return file.getvalue()


# -- what is tried again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [*PASSING, "cut"])
def test_what_may_pass_is_tried_again(fault: str):
    with faults(fault, fault) as flaky:
        assert receive(flaky) == DATA
        assert len(flaky.requests) <= 3


@pytest.mark.parametrize("fault", ["404", "web page"])
def test_what_does_not_pass_is_not(fault: str):
    with faults(*[fault] * 9) as flaky:
        with pytest.raises(Refused) as refused:
            receive(flaky)
        assert len(flaky.requests) == 1
        assert "\n" not in str(refused.value)


def test_a_server_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch):
    """In seconds and as a date, but not later than a limit."""
    with faults("429", retry_after="1") as flaky:
        assert receive(flaky) == DATA
        first, second = flaky.requests
        assert second.time - first.time >= 1
    date = int(time.time()) + 3
    with faults("429", retry_after=email.utils.formatdate(date, usegmt=True)) as flaky:
        assert receive(flaky) == DATA
        assert flaky.requests[1].time >= date - 0.01
    monkeypatch.setattr(download, "ASKED_S", 0.2)
    for retry_after in ("999999999", email.utils.formatdate(time.time() + 9e5, usegmt=True), "soon", "-1", "1e9"):
        with faults("503", retry_after=retry_after) as flaky:
            assert receive(flaky) == DATA
            assert len(flaky.requests) == 2


def test_a_busy_server_is_not_asked_by_the_other_connections(monkeypatch: pytest.MonkeyPatch):
    files = {str(number): DATA for number in range(24)}
    flaky = Flaky(files, lambda number, _: "429" if number < 8 else None, retry_after="1")
    with serving(flaky):
        sinks = [FileSink(io.BytesIO(), len(DATA), expected=ENTRY) for _ in files]
        addresses = [parse_address(f"{flaky.address}/{name}") for name in files]
        download.download(map(Transfer, addresses, sinks))
        assert all(sink.done for sink in sinks)
        assert len(flaky.requests) == 32


def test_a_wait_is_announced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "NOTICED_S", 0.5)
    said: list[str] = []
    with faults("429", retry_after="1") as flaky:
        assert receive(flaky, notify=said.append) == DATA
        (line,) = said
        assert line == f"{flaky.address}/a: HTTP Error 429: Too Many Requests; trying again in 1 s"
    monkeypatch.setattr(download, "ASKED_S", 1.0)
    with faults("429", retry_after="700") as flaky:
        assert receive(flaky, notify=said.append) == DATA
        assert said[1].endswith("; trying again in 1 s, not in the 700 s that it asks for")


# -- what is not waited for -------------------------------------------------------------------------------------------
# The patience is short after some attempts only: a slow machine may use it up with the first one.


def test_a_dead_server_is_one_line_after_a_stated_time(monkeypatch: pytest.MonkeyPatch):
    draws: list[float] = []

    def spread(low: float, high: float) -> float:
        draws.append(high)
        if len(draws) == 3:
            monkeypatch.setattr(download, "FIRST_PATIENCE_S", 0.5)
        return high

    monkeypatch.setattr(download, "spread", spread)
    monkeypatch.setattr(download, "FIRST_PATIENCE_S", 60.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # refuses connections, and nobody else gets the port
        with pytest.raises(Unreachable) as refused:
            download.read_address(parse_address(f"http://127.0.0.1:{closed.getsockname()[1]}/a"), 10)
    line = str(refused.value)
    assert re.fullmatch(r"cannot fetch http://.*/a: .*refused.*, \d+ attempts in \d+ s; check .*", line), line


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_a_server_that_stays_broken_ends_the_download(fault: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "PATIENCE_S", 60.0)

    def answer(number: int, _: Request) -> str:
        if number == 4:
            monkeypatch.setattr(download, "PATIENCE_S", 0.5)
        return fault

    with faults(etags=False) as flaky:
        flaky.fault = answer
        with pytest.raises(Refused, match=r"\d+ attempts|not the whole file") as refused:
            receive(flaky, expected=None)
        assert "\n" not in str(refused.value)


def test_a_server_that_always_asks_to_wait_ends_the_download(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "ASKED_IN_ALL_S", 1.5)
    with faults(*["429"] * 1000, retry_after="1") as flaky:
        with pytest.raises(Unreachable, match=r"429: .*, \d attempts in"):
            receive(flaky)
        assert len(flaky.requests) <= 3


def test_a_file_that_is_sent_again_and_again_is_left(monkeypatch: pytest.MonkeyPatch):
    """Every attempt gets a little further, and begins at the first byte."""
    data = bytes(8 << 20)
    monkeypatch.setattr(download, "PATIENCE_S", 60.0)
    with faults(*["200 for 206"] * 1000) as flaky:
        flaky.files["a"] = data
        flaky.fault = lambda number, _: "short"
        flaky.etags = False
        sink = FileSink(io.BytesIO(), len(data))
        with pytest.raises(Unreachable, match=r"sent \d+\.\d MiB in \d+ attempts and not the whole file"):
            download.download([Transfer(parse_address(f"{flaky.address}/a"), sink)])


# -- ranges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["reset", "short"])
def test_a_broken_file_is_continued(fault: str):
    with faults(fault) as flaky:
        assert receive(flaky) == DATA
        first, second = flaky.requests
        start = int(re.findall(r"bytes=(\d+)-", second.headers["Range"])[0])
        assert 0 < start <= first.sent
        assert second.sent == len(DATA) - start
        assert second.headers["If-Range"].startswith('"')


@pytest.mark.parametrize("second", ["200 for 206", "other range", "wrong"])
def test_a_range_that_is_not_the_one_asked_for_is_not_joined(second: str):
    with faults("short", second) as flaky:
        assert receive(flaky) == DATA


def test_two_versions_of_a_file_are_not_joined():
    with faults("short") as flaky:
        new = DATA[::-1]
        flaky.fault = lambda number, _: (
            "short" if number == 0 else flaky.files.update(a=new)  # type: ignore[func-returns-value]
        )
        assert receive(flaky, expected=None) == new
        assert "If-Range" in flaky.requests[1].headers
    with faults("short", etags=False) as flaky:  # nothing would notice: not continued
        assert receive(flaky, expected=None) == DATA
        assert "Range" not in flaky.requests[1].headers


def test_wrong_bytes_are_damage_in_the_end():
    with faults(*["wrong"] * 10) as flaky:
        with pytest.raises(Damaged, match=r"/a: size or SHA-256 differ from the manifest"):
            receive(flaky)
        assert len(flaky.requests) == 3


def test_a_tar_whose_members_are_wrong_one_after_another_arrives():
    """Each request has a wrong byte in the member after the one it begins with."""
    members = {str(number): random.Random(number).randbytes(50_000) for number in range(8)}
    entries = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in members.items()}
    pieces = [packed.header(name, len(data)) + data + packed.padding(len(data)) for name, data in members.items()]
    for fault in ("wrong later", "wrong"):
        got: dict[str, io.BytesIO] = {}

        def open_file(name: str, got: dict[str, io.BytesIO] = got) -> FileSink:
            got[name] = io.BytesIO()
            return FileSink(got[name], entries[name].size, expected=entries[name])

        with serving(Flaky({"a": b"".join(pieces) + packed.END}, lambda *_, fault=fault: fault)) as flaky:
            sink = packed.TarSink(entries, members, members.keys(), open_file)
            transfer = Transfer(parse_address(f"{flaky.address}/a"), sink)
            if fault == "wrong":
                with pytest.raises(Damaged, match=r"/a: 7: size or SHA-256 differ"):
                    download.download([transfer])
                assert len(flaky.requests) == download.WRONG_BODIES
                continue
            download.download([transfer])
            assert {name: file.getvalue() for name, file in got.items()} == members
            assert len(flaky.requests) > download.WRONG_BODIES


# -- many faults ------------------------------------------------------------------------------------------------------


def read_often(reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults drawn for every request; a read gives the right bytes or an error, and there are enough of both."""
    monkeypatch.setattr(protocols, "TIMEOUT_S", 0.6)
    files = {str(size): random.Random(size).randbytes(size) for size in (1, 900, 20_000, 200_000)}

    def fault(number: int, request: Request) -> str | None:
        draw = random.Random(f"{number} {request.path}")
        return draw.choice(FAULTS) if draw.random() < 0.4 else None

    def read(number: int) -> bool:
        name = list(files)[number % len(files)]
        data = files[name]
        file = io.BytesIO()
        entry = FileEntry(len(data), hashlib.sha256(data).hexdigest())
        transfer = Transfer(parse_address(f"{flaky.address}/{name}"), FileSink(file, entry.size, expected=entry))
        try:
            download.download([transfer], notify=lambda _: None)
        except RedistillError as error:
            errors.append(str(error))
            return False
        assert file.getvalue() == data
        return True

    errors: list[str] = []

    with serving(Flaky(files, fault)) as flaky, ThreadPoolExecutor(8) as pool:
        right = sum(pool.map(read, range(reads)))
        assert len(flaky.requests) > 1.2 * reads
    assert reads / 2 < right < reads
    assert not any("\n" in error for error in errors)


@pytest.mark.timeout(600)
def test_a_thousand_faulty_reads(monkeypatch: pytest.MonkeyPatch):
    read_often(1000, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_ten_thousand_faulty_reads(monkeypatch: pytest.MonkeyPatch):
    read_often(10_000, monkeypatch)


@pytest.mark.parametrize("form", ["tree", "packed"])
@pytest.mark.timeout(600)
def test_an_archive_from_a_faulty_server_is_the_archive(
    form: str, sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Manifest and documents included; an error is in one line, and the next call continues."""
    monkeypatch.setattr(protocols, "TIMEOUT_S", 1.0)
    source = sealed
    if form == "packed":
        source = tmp_path / "a.redistill"
        pack(sealed, source)
    files = {f"x/{path.relative_to(source)}": path.read_bytes() for path in source.rglob("*") if path.is_file()}

    def fault(number: int, request: Request) -> str | None:
        draw = random.Random(f"{number} {request.path}")
        return draw.choice(FAULTS) if draw.random() < (0.1 if form == "tree" else 0.5) else None

    with serving(Flaky(files, fault)) as flaky:
        errors: list[str] = []
        while len(errors) < 60:
            try:
                fetch_archive(f"{flaky.address}/x", tmp_path / "out", notify=lambda _: None)
                break
            except RedistillError as error:
                errors.append(str(error))
    print(f"{len(errors)} errors, {len(flaky.requests)} requests")
    assert not any("\n" in error for error in errors)
    assert contents(tmp_path / "out") == contents(sealed)


def test_a_manifest_that_changes_meanwhile_mixes_nothing(sealed: Path, tmp_path: Path):
    from tests import tiny_archive

    tiny_archive.make(tmp_path / "new", teachers=("other",))
    old, new = ({f"x/{name}": data for name, data in contents(path).items()} for path in (sealed, tmp_path / "new"))

    def fault(number: int, request: Request) -> str | None:
        if number == 5:
            flaky.files = new
        return None

    with serving(Flaky(old, fault)) as flaky:
        with pytest.raises(RedistillError):
            fetch_archive(f"{flaky.address}/x", tmp_path / "out")
        with pytest.raises(Refused, match=r"another archive|holds other files"):
            fetch_archive(f"{flaky.address}/x", tmp_path / "out")
        fetch_archive(f"{flaky.address}/x", tmp_path / "out2")
    assert contents(tmp_path / "out2") == contents(tmp_path / "new")


# -- tokens -----------------------------------------------------------------------------------------------------------

TOKEN = "s3cr3t-t0ken"


def test_a_token_goes_to_its_server_only_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch):
    with faults() as flaky, faults() as other:
        monkeypatch.setenv("REDISTILL_TOKENS", f"https://example.org=abc {flaky.address}={TOKEN}")
        assert receive(flaky) == receive(other) == DATA
        assert flaky.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"
        assert "Authorization" not in other.requests[0].headers
        with pytest.raises(Refused) as refused:
            download.read_address(parse_address(f"{flaky.address}/none"), 10)
        assert TOKEN not in str(refused.value)
        for wrong in (TOKEN, f"{flaky.address}={TOKEN}\x01", f"ftp://x={TOKEN}", f"{flaky.address}/path={TOKEN}"):
            monkeypatch.setenv("REDISTILL_TOKENS", wrong)
            with pytest.raises(UsageError, match=r"expected https://HOST=TOKEN") as usage:
                receive(flaky)
            assert TOKEN not in str(usage.value)


@pytest.mark.parametrize("stored", ["HF_TOKEN", "store"])
def test_the_hub_gets_the_token_of_its_own_package(
    stored: str, sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("huggingface_hub")
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)  # it reads the environment once
    pack(sealed, tmp_path / "a.redistill")
    folder = "datasets/lab/r50/resolve/v1/teachers/a.redistill"
    files = {f"{folder}/{path.name}": path.read_bytes() for path in (tmp_path / "a.redistill").iterdir()}
    with serving(Flaky(files, lambda number, _: "429" if number == 1 else None)) as flaky:
        monkeypatch.setenv("HF_ENDPOINT", flaky.address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        if stored == "HF_TOKEN":
            monkeypatch.setenv("HF_TOKEN", TOKEN)
        else:
            (tmp_path / "hub").mkdir()
            (tmp_path / "hub" / "token").write_text(TOKEN)
        copy = fetch_archive("hf://datasets/lab/r50@v1/teachers/a.redistill")
        with pytest.raises(Refused) as refused:
            fetch_archive("hf://datasets/lab/none/a.redistill")
    assert contents(copy) == contents(sealed)
    assert {request.headers["Authorization"] for request in flaky.requests} == {f"Bearer {TOKEN}"}
    assert "hf://datasets/lab/none/a.redistill" in str(refused.value)
    assert TOKEN not in json.dumps([str(refused.value), *map(str, copy.parents)])
