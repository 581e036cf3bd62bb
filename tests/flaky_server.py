"""An http server on loopback with ranges and ETags, that goes wrong as it is told."""

from __future__ import annotations

import hashlib
import http.server
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

# What a request may get instead of its answer.
FAULTS = (
    "429", "503", "408", "404", "reset", "short", "cut", "silent", "wrong", "longer", "200 for 206", "other range",
    "slow", "endless", "web page",
)  # fmt: skip
PASSING = ("429", "503", "408", "reset", "short", "wrong", "200 for 206", "other range", "slow")
"""Those that another attempt gets over."""
# With a message for a person, but no more than that.
RETRY_AFTER = {"429": "0", "503": None, "408": None, "404": None}


@dataclass
class Request:
    path: str
    headers: Mapping[str, str]
    time: float
    sent: int = 0


@dataclass
class Flaky:
    """Files by path; `fault(number, request)` is the fault of a request, or None."""

    files: dict[str, bytes]
    fault: Callable[[int, Request], str | None] = lambda _, __: None
    retry_after: str | None = None
    etags: bool = True
    requests: list[Request] = field(default_factory=list)
    address: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    leave: Callable[[], None] = lambda: None
    """Refuse connections from now on; nobody else gets the port before the server is closed."""

    def numbered(self, request: Request) -> int:
        with self.lock:
            self.requests.append(request)
            return len(self.requests) - 1


class Handler(http.server.BaseHTTPRequestHandler):
    flaky: Flaky

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        request = Request(self.path, dict(self.headers), time.time())
        number = self.flaky.numbered(request)
        try:
            self.answer(request, self.flaky.fault(number, request))
        except OSError:
            return  # the client left

    def answer(self, request: Request, fault: str | None) -> None:
        data = self.flaky.files.get(self.path.partition("?")[0].lstrip("/"))
        if data is None:
            fault = "404"
        if fault in RETRY_AFTER:
            self.send_response(int(fault))
            wait = self.flaky.retry_after or RETRY_AFTER[fault]
            if wait is not None and fault != "404":
                self.send_header("Retry-After", wait)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        assert data is not None
        if fault == "web page":
            data = b"<html>log in</html>"
        self.send_file(request, data, fault)

    def send_file(self, request: Request, data: bytes, fault: str | None) -> None:
        tag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range", tag) == tag
        first, stop = 0, len(data)
        if asked and fresh and fault != "200 for 206":
            first, stop = int(asked[1]), min(len(data), int(asked[2] or len(data)) + 1)
            if first >= len(data):
                self.send_response(416)
                self.end_headers()
                return
            if fault == "other range":
                first = max(0, first - 3)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[first:stop]
        if fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault == "wrong later" and len(body) > 60_000:
            body = body[:60_000] + bytes([body[60_000] ^ 1]) + body[60_001:]
        if fault == "longer":
            body += b"more"
        if self.flaky.etags:
            self.send_header("ETag", tag)
        if fault not in ("cut", "endless"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send_body(request, body, fault)

    def send_body(self, request: Request, body: bytes, fault: str | None) -> None:
        if fault in ("reset", "short", "cut", "silent"):
            body = body[: len(body) // 2]
        pieces = [body[at : at + max(1, len(body) // 4)] for at in range(0, len(body), max(1, len(body) // 4))]
        for piece in pieces:
            request.sent += len(piece)  # before the client can have it and ask what was sent
            self.wfile.write(piece)
            if fault == "slow":
                time.sleep(0.01)
        self.wfile.flush()
        if fault == "silent":
            self.flaky.stopped.wait(60)
        while fault == "endless" and not self.flaky.stopped.is_set():
            self.wfile.write(bytes(1 << 16))
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        return  # a client that left; printed, it would be taken for the output of a command


@contextmanager
def serving(flaky: Flaky) -> Iterator[Flaky]:
    server = Server(("127.0.0.1", 0), type("FlakyHandler", (Handler,), {"flaky": flaky}))
    flaky.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def leave() -> None:
        server.shutdown()
        server.socket.shutdown(socket.SHUT_RDWR)

    flaky.leave = leave
    try:
        yield flaky
    finally:
        flaky.stopped.set()
        server.shutdown()
        server.server_close()
