"""Servers on loopback that are slow, endless, silent, or redirect elsewhere: every download ends, in one line."""

from __future__ import annotations

import base64
import io
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redistill_cache import download, open_archive, protocols
from redistill_cache.addresses import parse_address
from redistill_cache.errors import RedistillError, Refused, UsageError

import redistill
from redistill.sources import wds
from tests import tiny_archive

Handler = Callable[[socket.socket, bytes], None]
Serve = Callable[..., tuple[str, list[bytes]]]
OK = b"HTTP/1.1 200 OK\r\n"
PAGE = b"\n <!DOCTYPE html><html>please log in</html>"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for patience in ("FIRST_PATIENCE_S", "PATIENCE_S"):
        monkeypatch.setattr(download, patience, 0.0)
    return tmp_path / "cache" / "redistill"


@pytest.fixture
def answer() -> Iterator[Serve]:
    """Call with what to do on a connection after its request: the address, and the growing list of requests."""
    listeners: list[socket.socket] = []

    def start(handle: Handler, host: str = "127.0.0.1") -> tuple[str, list[bytes]]:
        listener = socket.create_server((host, 0))
        listeners.append(listener)
        requests: list[bytes] = []

        def serve_one(connection: socket.socket) -> None:
            with connection:
                try:
                    request = b""
                    while b"\r\n\r\n" not in request:
                        received = connection.recv(4096)
                        if not received:
                            return
                        request += received
                    requests.append(request)
                    handle(connection, request)
                except OSError:
                    return  # the client left

        def serve() -> None:
            while True:
                try:
                    connection = listener.accept()[0]
                except OSError:
                    return
                threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return f"http://{host}:{listener.getsockname()[1]}", requests

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def send(*parts: bytes) -> Handler:
    return lambda connection, request: connection.sendall(b"".join(parts))


def file_of(content: bytes) -> Handler:
    return send(OK, b"Content-Length: %d\r\n\r\n" % len(content), content)


def forever(start: bytes, piece: bytes, seconds: float = 0.0) -> Handler:
    def handle(connection: socket.socket, request: bytes) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(piece)
            time.sleep(seconds)

    return handle


def redirect(to: str, body: Handler | None = None) -> Handler:
    def handle(connection: socket.socket, request: bytes) -> None:
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: %s\r\n\r\n" % to.encode())
        if body is not None:
            body(connection, request)

    return handle


def refusal(address: str, most: int = 1 << 20) -> str:
    with pytest.raises(RedistillError) as refused:
        download.read_address(parse_address(address), most)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- slow and endless -------------------------------------------------------------------------------------------------


def test_a_slow_server_is_named_once_and_waited_for(answer: Serve, monkeypatch: pytest.MonkeyPatch):
    """However slow: a few bytes a second, for many of the minutes in which it is slow, until the file is here."""
    monkeypatch.setattr(download, "MINUTE_S", 0.1)
    content = bytes(range(256))

    def handle(connection: socket.socket, request: bytes) -> None:
        connection.sendall(OK + b"Content-Length: 256\r\n\r\n")
        for byte in content:
            connection.sendall(bytes([byte]))
            time.sleep(0.01)

    address, _ = answer(handle)
    said: list[str] = []
    assert download.read_address(parse_address(f"{address}/a"), 1 << 20, notify=said.append) == content
    (line,) = said
    assert "B/s in the last minute; waiting as long as some bytes come, at most" in line


SILENT: dict[str, Handler] = {
    "says nothing": lambda connection, request: time.sleep(60),
    "sends headers without an end": forever(OK, b"X: y\r\n", 0.05),
    "goes on before it answers": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    "stops after a byte": lambda connection, request: (connection.sendall(OK + b"\r\nx"), time.sleep(60))[0],
}


@pytest.mark.parametrize("name", SILENT)
def test_a_server_without_bytes_is_left(
    answer: Serve, monkeypatch: pytest.MonkeyPatch, name: str, threads: Callable[[], set[str]]
):
    monkeypatch.setattr(protocols, "TIMEOUT_S", 0.4)
    address, _ = answer(SILENT[name])
    with pytest.raises(download.Unreachable, match=r"/a: (no bytes for|timed out|got more than|.*timed out)"):
        download.read_address(parse_address(f"{address}/a"), 1 << 20)
    deadline = time.monotonic() + 60
    while any("_receive" in thread for thread in threads()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [thread for thread in threads() if "_receive" in thread]


def test_more_bytes_than_expected_are_not_read(answer: Serve):
    address, _ = answer(forever(OK + b"\r\n", bytes(1 << 16)))
    assert "more than the limit of 1048576 bytes" in refusal(f"{address}/a")


def test_a_web_page_is_not_taken_for_a_damaged_manifest(answer: Serve):
    address, _ = answer(file_of(PAGE))
    with pytest.raises(Refused, match="the server sent a web page instead of the file"):
        open_archive(f"{address}/a.redistill.zarr")


# -- redirects --------------------------------------------------------------------------------------------------------


def test_redirects_are_few_and_their_bodies_are_not_read(answer: Serve):
    target, _ = answer(file_of(b"content"))
    address, requests = answer(redirect(f"{target}/b", forever(b"", bytes(1 << 16))))
    assert download.read_address(parse_address(f"{address}/a"), 100) == b"content"
    assert len(requests) == 1
    around, requests = answer(redirect("/again"))
    assert "redirected more than 5 times" in refusal(f"{around}/a")
    assert len(requests) == 6


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/a", "file:///etc/passwd", "data:,x", "gopher://h/", "http://h/../.."])
def test_redirects_lead_to_http_only(answer: Serve, to: str):
    address, requests = answer(redirect(to))
    assert "is redirected to an address that is not followed" in refusal(f"{address}/a")
    assert len(requests) == 1


def test_a_redirect_from_https_to_http_is_refused():
    with pytest.raises(Refused, match="not followed"):
        protocols._redirected(parse_address("https://example.org/a"), "http://example.org/a")


def own_address() -> str | None:
    """An address of this machine that other machines see."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        host = str(probe.getsockname()[0])
    return None if protocols.how_private(host) == 2 else host


def test_a_redirect_does_not_lead_to_a_more_private_network(answer: Serve):
    host = own_address()
    if host is None:
        pytest.skip("this machine has no network")
    inside, requests = answer(file_of(b"secret"))
    outside, _ = answer(redirect(f"{inside}/metadata"), host)
    assert "in a more private network than its own" in refusal(f"{outside}/a")
    assert not requests
    back, _ = answer(redirect(f"{outside}/a"))  # this machine may send to its network, and back to itself
    assert download.read_address(parse_address(f"{back}/a"), 100) == b"secret"


@pytest.mark.parametrize(
    ("host", "privacy"),
    [
        ("93.184.215.14", 0),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", 0),
        ("10.1.2.3", 1),
        ("100.64.0.1", 1),
        ("fd00::1", 1),
        ("169.254.169.254", 2),
        ("127.0.0.53", 2),
        ("0.0.0.0", 2),
        ("::1", 2),
        ("::ffff:127.0.0.1", 2),
        ("fe80::1%eth0", 2),
    ],
)
def test_what_is_private(host: str, privacy: int):
    assert protocols.how_private(host) == privacy


def test_a_password_is_sent_to_its_server_only_and_shown_nowhere(answer: Serve):
    other, requests = answer(send(b"HTTP/1.1 404 Not Found\r\n\r\n"))
    address, own = answer(redirect(f"{other}/b"))
    message = refusal(address.replace("://", "://me:hunter2@") + "/a?token=s3cr3t&part=1")
    assert b"Authorization: Basic " + base64.b64encode(b"me:hunter2") in own[0]
    assert b"token=s3cr3t&part=1" in own[0]
    assert b"Authorization" not in requests[0]
    assert "/a?token=***&part=1" in message
    assert "hunter2" not in message


def test_a_proxy_is_used(answer: Serve, monkeypatch: pytest.MonkeyPatch):
    address, requests = answer(file_of(b"from the proxy"))
    monkeypatch.setenv("http_proxy", address)
    assert download.read_address(parse_address("http://nowhere.example/a"), 100) == b"from the proxy"
    assert requests[0].startswith(b"GET http://nowhere.example/a ")


@pytest.mark.parametrize("chain", ["reference://a::{0}", "filecache::{0}", "zip://*::{0}", "{0}::{0}", "{0}/a::b"])
def test_chained_addresses_are_refused_and_nothing_is_fetched(answer: Serve, chain: str):
    address, requests = answer(file_of(b"{}"))
    with pytest.raises(UsageError):
        open_archive(chain.replace("{0}", address))
    assert not requests


# -- tars -------------------------------------------------------------------------------------------------------------


def small_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in (("1.png", b"x"), ("1.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


BAD: dict[str, Handler] = {
    "a web page": file_of(PAGE),
    "other bytes": file_of(b"nothing of a tar" * 100),
    "truncated, without a length": send(OK, b"\r\n", small_tar()[:1024]),
    "truncated, with a length": send(OK, b"Content-Length: 10240\r\n\r\n", small_tar()[:1024]),
    "empty": file_of(b""),
    "endless": forever(OK + b"\r\n", small_tar()[:1024]),
    "a petabyte": send(OK, b"Content-Length: %d\r\n\r\n" % (1 << 50), small_tar()),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tar_is_not_cached(answer: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(wds, "MAX_UNANNOUNCED_BYTES", 1 << 20)
    now = BAD[name]
    address, _ = answer(lambda connection, request: now(connection, request))
    with pytest.raises(Refused) as refused:
        redistill.open_source(f"wds:{address}/a.tar")
    assert f"{address}/a.tar" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list((cache / "tars").iterdir())
    now = file_of(small_tar())
    assert len(redistill.open_source(f"wds:{address}/a.tar")) == 1


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def interrupted(arguments: list[str], requests: list[bytes], enough: int) -> tuple[int, str]:
    """Exit code and stderr of a command that gets one SIGINT once the server has got so many requests."""
    command = [sys.executable, "-m", "redistill_cli", *arguments]
    # A process inherits that SIGINT is ignored, as by tests that a shell runs in the background, but not a handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        signal.signal(signal.SIGINT, before)
        try:
            deadline = time.monotonic() + 120
            while len(requests) < enough and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, err


def test_one_ctrl_c_ends_the_fetch_of_an_archive(answer: Serve, tmp_path: Path, cache: Path):
    archive = tmp_path / "tiny.redistill.zarr"
    tiny_archive.make(archive)

    def documents_only(connection: socket.socket, request: bytes) -> None:
        path = tmp_path / request.split()[1].decode().lstrip("/")
        if path.suffix == ".json":
            file_of(path.read_bytes())(connection, request)
        else:
            time.sleep(60)

    address, requests = answer(documents_only)
    code, err = interrupted(["verify", f"{address}/{archive.name}"], requests, 10)
    assert (code, err) == (130, "redistill: interrupted\n")
    assert not list(cache.rglob("*.partial"))


def test_one_ctrl_c_ends_the_download_of_a_tar(answer: Serve, tmp_path: Path, cache: Path):
    address, requests = answer(forever(OK + b"\r\n", b"x", 0.05))
    out = tmp_path / "a.zarr"
    arguments = [
        "cache-teacher",
        f"wds:{address}/a.tar",
        "--teacher",
        "demo:small?num_classes=5&weights=random",
        "--out",
        str(out),
    ]
    code, err = interrupted(arguments, requests, 1)
    assert code == 130
    assert "interrupted by SIGINT" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(cache.rglob("*.partial"))
