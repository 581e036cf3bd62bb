"""Determinism of all tests, and a local web server for tests of downloads."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import hypothesis
import pytest

from tests.flaky_server import Server

# A run fails because of a change, not because of the examples that were drawn in it or the load of the machine.
hypothesis.settings.register_profile(
    "deterministic", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    """Numbers from the global generator of torch do not depend on the tests that ran before in the same process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def child_processes() -> Callable[[], set[BaseProcess]]:
    """Call it for the child processes that run and were started by this test, and not by one before it."""
    before = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - before


@pytest.fixture
def threads() -> Callable[[], set[str]]:
    """Call it for the names of the threads that run and were started by this test, and not by one before it."""
    before = set(threading.enumerate())
    return lambda: {thread.name for thread in set(threading.enumerate()) - before}


@contextmanager
def folder_in_memory(otherwise: Path) -> Iterator[Path]:
    """A temporary folder, in memory where possible, for tests that need no real disk."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield otherwise
        return
    with tempfile.TemporaryDirectory(dir=shared, prefix="redistill-") as folder:
        yield Path(folder)


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    with folder_in_memory(tmp_path) as folder:
        yield folder


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and records the requests instead of printing them.

    The connection closes halfway for a path that ends in '.short', and on the first request for a path in `fragile`.
    For a path in `stuck` it stays open as long as the server, without the second half.
    """

    requests: list[str]
    fragile: set[str]
    stuck: set[str]
    stopped: threading.Event

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.requests.append(self.path)
        path = self.path.removesuffix(".short")
        if path == self.path not in self.fragile | self.stuck:
            super().do_GET()
            return
        self.fragile.discard(path)
        data = Path(self.translate_path(path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        if path in self.stuck:
            self.wfile.flush()
            self.stopped.wait()


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, list[str]]]]:
    """Call with a folder: the address it is served under, and the growing list of requests."""
    servers: list[Server] = []
    stopped = threading.Event()

    def start(folder: Path, fragile: Sequence[str] = (), stuck: Sequence[str] = ()) -> tuple[str, list[str]]:
        requests: list[str] = []
        state = {"requests": requests, "fragile": set(fragile), "stuck": set(stuck), "stopped": stopped}
        handler = type("Handler", (QuietHandler,), state)
        server = Server(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}", requests

    yield start
    stopped.set()
    for server in servers:
        server.shutdown()
        server.server_close()
