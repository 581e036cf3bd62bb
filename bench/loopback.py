"""A web server on loopback, in a process of its own, that is as slow and as unreliable as it is told.

Every request waits for the latency of a distant server, and every n-th is answered with 503. Ranges are served, so that
a reader may continue. Files are sent by the kernel, as servers of large files do it, because this one shares its cores
with what is measured. It counts the bytes it has sent, by file.
"""

from __future__ import annotations

import argparse
import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

COUNTS = "/.bytes-sent"
PIECE = 1 << 20


class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    latency = 0.0
    failure_every = 0
    numbers = itertools.count(1)
    sent: ClassVar[Counter[str]] = Counter()
    lock = threading.Lock()

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        if self.path == COUNTS:
            self.answer(200, json.dumps(self.sent).encode())
            return
        time.sleep(self.latency)
        path = Path(self.translate_path(self.path))
        if self.failure_every and next(self.numbers) % self.failure_every == 0:
            self.answer(503)
        elif not path.is_file():
            self.answer(404)
        else:
            self.send(path)

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send(self, path: Path) -> None:
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2] or size - 1), size - 1) if asked else size - 1
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}-{size:x}"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        with path.open("rb") as file:
            while first <= last:
                count = os.sendfile(self.connection.fileno(), file.fileno(), first, min(PIECE, last + 1 - first))
                first += count
                with self.lock:
                    self.sent[self.path] += count


@dataclass(frozen=True)
class Server:
    address: str

    def bytes_sent(self) -> dict[str, int]:
        with urllib.request.urlopen(self.address + COUNTS, timeout=60) as answer:
            return {str(path): int(count) for path, count in json.load(answer).items()}


@contextmanager
def served(folder: Path, *, latency: float = 0.0, failures: float = 0.0) -> Iterator[Server]:
    """The address of a folder, with seconds of latency and a share of failures."""
    command = [sys.executable, __file__, str(folder), str(latency), str(failures)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Server(process.stdout.readline().strip())
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("latency", type=float)
    parser.add_argument("failures", type=float)
    args = parser.parse_args()
    Handler.latency = args.latency
    Handler.failure_every = round(1 / args.failures) if args.failures else 0

    def handler(*arguments: object) -> Handler:
        return Handler(*arguments, directory=args.folder)  # type: ignore[arg-type]  # what the server passes

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
