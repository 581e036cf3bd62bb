"""Clients of buckets: python bench/buckets.py [--quick] [--json PATH]

fsspec with s3fs, through which archives at s3:// are read and written; obstore, if it is installed; and urllib, without
keys and for reading only, as the control. All ask the same S3 server, moto's, in a process of its own on loopback. It
shares the cores with them: MB/s are less than those of a real server, and the CPU seconds are those of the client.

first      from before the import of the client to the first MB of an object
opens      one object of 4 KB after another
small      objects of 4 KB, eight at a time, as a fetch does
ranges     a large object in ranges of 16 MiB, each in pieces of 1 MiB, as a fetch continues files
large      eight large objects at a time, in pieces of 1 MiB, as a fetch does
send       eight large objects, four at a time, in parts of 8 MiB, as a copy does

Each task is a process of its own, and repeated: times are medians, the peak memory is the highest. `extra_megabytes` is
what a client installs beside what redistill needs anyway.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import harness
from packaging.requirements import Requirement
from redistill_cache.addresses import SCHEMES, parse_address
from redistill_cache.download import CONNECTIONS, PIECE
from redistill_cache.protocols import RemoteFile, opened
from redistill_cache.sending import BLOCK, Bucket
from redistill_cache.sending import CONNECTIONS as SENDING

CLIENTS = {"fsspec": "s3fs", "obstore": "obstore", "urllib": None}  # and what they install
RANGE = 16 << 20
SMALL = 4096
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


# -- clients ----------------------------------------------------------------------------------------------------------


class Client(Protocol):
    def read(self, name: str, first: int = 0, last: int | None = None) -> int:
        """Read a range of an object in pieces; how many bytes came."""

    def send(self, sizes: dict[str, int]) -> None:
        """Write objects in parts."""


class Redistills:
    """The code of redistill: fsspec for s3://, urllib for http://."""

    def __init__(self, address: str) -> None:
        self.address = address

    def read(self, name: str, first: int = 0, last: int | None = None) -> int:
        received = 0
        with opened(RemoteFile(parse_address(f"{self.address}/{name}")), first, last) as answer:
            while last is None or received < last - first:
                piece = answer.read(PIECE if last is None else min(PIECE, last - first - received))
                if not piece:
                    break
                received += len(piece)
        return received

    def send(self, sizes: dict[str, int]) -> None:
        bucket = Bucket(parse_address(f"{self.address}/sent", SCHEMES))
        files: dict[str, Callable[[], Iterator[bytes]]] = {n: partial(pieces, size) for n, size in sizes.items()}
        assert len([*bucket.send(files, sizes)]) == len(sizes)


class Obstores:
    def __init__(self, address: str) -> None:
        from obstore.store import from_url

        self.store = from_url(address, client_options={"allow_http": True})

    def read(self, name: str, first: int = 0, last: int | None = None) -> int:
        import obstore

        options = {} if last is None else {"range": (first, last)}
        return sum(map(len, obstore.get(self.store, name, options=options).stream(min_chunk_size=PIECE)))

    def send(self, sizes: dict[str, int]) -> None:
        import obstore

        def put(name: str, size: int) -> None:
            obstore.put(self.store, f"sent/{name}", pieces(size), chunk_size=BLOCK)

        with ThreadPoolExecutor(SENDING) as pool:
            [*pool.map(put, sizes.keys(), sizes.values())]


def pieces(size: int) -> Iterator[bytes]:
    piece = bytes(PIECE)
    for _ in range(size // PIECE):
        yield piece


def client_of(name: str, server: str) -> Client:
    if name == "obstore":
        return Obstores("s3://lab")
    return Redistills("s3://lab" if name == "fsspec" else f"{server}/lab")


# -- tasks, each in a process -----------------------------------------------------------------------------------------


def work(name: str, task: str, server: str, small: int, size: int) -> None:
    """Do one task, and print what it took as JSON."""
    began, cpu = time.perf_counter(), time.process_time()
    client = client_of(name, server)
    if task != "first":  # the import and the first connection
        client.read("small-0")
        began, cpu = time.perf_counter(), time.process_time()
    large = [f"large-{number}" for number in range(8)]
    if task == "first":
        received = client.read(large[0], 0, PIECE)
    elif task == "opens":
        received = sum(client.read(f"small-{number}") for number in range(small // 4))
    elif task == "small":
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            received = sum(pool.map(client.read, (f"small-{number}" for number in range(small))))
    elif task == "ranges":
        received = sum(client.read(large[0], first, first + RANGE) for first in range(0, size, RANGE))
    elif task == "large":
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            received = sum(pool.map(client.read, large))
    else:
        client.send(dict.fromkeys(large, size))
        received = len(large) * size
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(json.dumps({"bytes": received, "seconds": seconds, "cpu": cpu, "peak": harness.peak_memory()}))


def measured(name: str, task: str, server: str, small: int, size: int, repeats: int) -> dict[str, Any]:
    code = f"import buckets; buckets.work({name!r}, {task!r}, {server!r}, {small}, {size})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    runs = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
        runs.append(json.loads(done.stdout))
    received = {"first": PIECE, "opens": small // 4 * SMALL, "small": small * SMALL, "ranges": size}.get(task, 8 * size)
    assert all(run["bytes"] == received for run in runs), runs
    seconds, cpu = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu"))
    row: dict[str, Any] = {"name": task, "client": name}
    if task == "first":
        row |= {"milliseconds": 1e3 * seconds}
    elif task in ("opens", "small"):
        row |= {"milliseconds": 1e3 * seconds / (received // SMALL)}
    else:
        row |= {"megabytes_per_second": received / seconds / 1e6, "cpu_seconds_per_gigabyte": cpu / received * 1e9}
    return row | {"peak_memory_megabytes": max(run["peak"] for run in runs) / 1e6}


# -- what is installed ------------------------------------------------------------------------------------------------


def closure(*packages: str) -> set[str]:
    """These packages and what they need, of what is installed."""
    found: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            needed = map(Requirement, requires)
            waiting += [need.name for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def installed_megabytes(package: str) -> float:
    names = closure(package) - closure("redistill")
    files = [Path(str(file.locate())) for name in names for file in distribution(name).files or []]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


# -- the server -------------------------------------------------------------------------------------------------------


@contextmanager
def s3_server(small: int, size: int) -> Iterator[str]:
    """The address of a server with the bucket 'lab', whose keys and address are in the environment."""
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = f"http://127.0.0.1:{int(process.stdout.readline())}"
            os.environ.update(KEYS, AWS_ENDPOINT_URL=address)
            put(f"{address}/lab", b"")
            for number in range(small):
                put(f"{address}/lab/small-{number}", bytes(SMALL))
            for number in range(8):
                put(f"{address}/lab/large-{number}", bytes(size))
            yield address
        finally:
            process.stdin.close()


def put(address: str, data: bytes) -> None:
    headers = {"x-amz-acl": "public-read", "Content-Type": "application/octet-stream"}
    request = urllib.request.Request(address, data, headers, method="PUT")
    urllib.request.urlopen(request, timeout=60).close()


def main() -> None:
    args = harness.arguments(__doc__ or "").parse_args()
    small, size, repeats = (64, 32 << 20, 1) if args.quick else (2000, 128 << 20, 5)
    rows: list[dict[str, Any]] = []
    with s3_server(small, size) as server:
        for name, package in CLIENTS.items():
            if package is not None and find_spec(package) is None:
                print(f"{name} is left out: {package} is not installed", flush=True)
                continue
            for task in ("first", "opens", "small", "ranges", "large", "send"):
                if task != "send" or package is not None:
                    rows.append(measured(name, task, server, small, size, repeats))
            if package is not None:
                sizes = {"version": version(package), "extra_megabytes": installed_megabytes(package)}
                rows.append({"name": "installed", "client": name} | sizes)
    harness.report("buckets", rows, args)


if __name__ == "__main__":
    main()
