"""Archives whose views come while they are read: what is fetched, when, by whom, and what ends a wait."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import arrivals, download, fetch_archive, layout, open_archive, stream_archive
from redistill_cache.errors import Incomplete, Refused
from redistill_cache.packing import pack
from redistill_cache.verify import verify

from tests import tiny_archive
from tests.flaky_server import Flaky, Request, serving
from tests.tiny_archive import contents, stored_logits

VIEWS = 3


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "WAIT_S", 0.01)
    monkeypatch.setattr(download, "LONGEST_WAIT_S", 0.05)


@contextmanager
def served(archive: Path, fault: Callable[[int, Request], str | None] = lambda *_: None) -> Iterator[tuple[str, Flaky]]:
    files = {f"x/{path.relative_to(archive)}": path.read_bytes() for path in archive.rglob("*") if path.is_file()}
    with serving(Flaky(files, fault)) as flaky:
        yield f"{flaky.address}/x", flaky


def view_of(request: Request) -> int | None:
    """The view that a request is for, in either form."""
    name = request.path.removeprefix("/x/")
    return int(name[5:9]) if name.startswith("view-") else layout.view_of_file(name)


def views_asked(flaky: Flaky) -> list[int]:
    """In the order in which they were asked for first."""
    return list(dict.fromkeys(view for view in map(view_of, flaky.requests) if view is not None))


@pytest.mark.parametrize("form", ["tree", "packed"])
def test_a_view_is_fetched_when_it_is_read(form: str, sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = sealed
    if form == "packed":
        source = tmp_path / "a.redistill"
        pack(sealed, source)
    with served(source) as (address, flaky):
        archive = stream_archive(address)
        assert (archive.num_views, archive.complete, archive.id) == (VIEWS, False, open_archive(sealed).id)
        assert len(archive.keys) == archive.num_samples
        assert not views_asked(flaky)
        with pytest.raises(Incomplete, match="does not hold the first view of its archive; fetch that with"):
            open_archive(archive.path)
        assert np.array_equal(archive.logits(2), stored_logits(2))
        assert views_asked(flaky) == [2]
        with pytest.raises(Incomplete):
            open_archive(archive.path)
        other = pickle.loads(pickle.dumps(archive))  # as in a worker
        assert np.array_equal(other.logits(0, [3]), stored_logits(0)[[3]])
        assert archive.arrivals.here(0)
        assert views_asked(flaky) == [2, 0]
        assert open_archive(archive.path).num_views == 1
        archive.view_params(1)
        archive.arrivals.close()
        assert archive.complete
        assert contents(archive.path) == contents(sealed)
        assert verify(archive.path, full=True).ok
        assert stream_archive(address).arrivals is None
        sent = [request.path for request in flaky.requests if view_of(request) is not None]
        assert len(sent) == len(set(sent)), "nothing is fetched twice"
        monkeypatch.setenv("REDISTILL_OFFLINE", "1")
        assert stream_archive(address).arrivals is None


@pytest.mark.parametrize("form", ["tree", "packed"])
def test_rows_of_other_teachers_are_fetched_once_they_are_read(form: str, tmp_path: Path):
    source, whole = tmp_path / "two", tmp_path / "two"
    tiny_archive.make(source, replace(tiny_archive.SPEC, block_rows=64), ("other", "tiny"))
    if form == "packed":
        source = tmp_path / "two.redistill"
        pack(whole, source)
    with served(source) as (address, _):
        archive = stream_archive(address)

        def here(teacher: str) -> list[str]:
            return sorted(path.name for path in (archive.path / f"teachers/{teacher}/logits/values").glob("c.*"))

        archive.arrivals.only(["tiny"])
        archive.arrivals.expect([1])
        archive.arrivals.wait(1)
        archive.arrivals.expect([])  # else it would come with the rows of the other teacher
        assert (here("tiny"), here("other")) == (["c.1.0.0"], [])
        other = pickle.loads(pickle.dumps(archive))  # as in a worker
        other.view_params(0)
        assert np.array_equal(other.logits(0, teacher="tiny"), open_archive(whole).logits(0, teacher="tiny"))
        assert (here("tiny"), here("other")) == (["c.0.0.0", "c.1.0.0"], [])
        assert archive.arrivals.here(0)
        copy = open_archive(archive.path)
        assert (list(copy.teachers), copy.num_views, copy.state.lacking) == (["tiny"], 2, {"other": 0})
        assert np.array_equal(archive.logits(0, teacher="other"), open_archive(whole).logits(0, teacher="other"))
        assert (here("tiny"), here("other")) == (["c.0.0.0", "c.1.0.0"], ["c.0.0.0"])
        assert not archive.complete
        copy = open_archive(archive.path)
        assert (copy.views_of("tiny"), copy.views_of("other"), copy.complete) == (2, 1, False)
        archive.arrivals.close()
        other.arrivals.close()
        assert contents(fetch_archive(address)) == contents(whole)
        assert archive.complete


def test_expected_views_come_in_order_and_one_that_is_waited_for_first(sealed: Path):
    go = threading.Event()
    with served(sealed, lambda _, request: go.wait(60) and None if view_of(request) == 1 else None) as (address, flaky):
        archive = stream_archive(address)
        archive.arrivals.expect([1, 0])
        while not views_asked(flaky):
            time.sleep(0.01)
        done = threading.Thread(target=archive.logits, args=(2,))
        done.start()
        while not archive.arrivals._awaited[2]:
            time.sleep(0.01)
        assert views_asked(flaky) == [1]
        go.set()
        done.join(60)
        archive.arrivals.wait(0)
        assert views_asked(flaky) == [1, 2, 0]
        archive.arrivals.close()


def test_a_server_that_is_away_ends_a_wait_only(sealed: Path, monkeypatch: pytest.MonkeyPatch):
    """Ahead of use it is asked again; who waits gets its error in one line, and the view once it is there.

    Its patience is the waits that the server asks for, and not the time that they take.
    """
    monkeypatch.setattr(download, "ASKED_S", 0.05)
    monkeypatch.setattr(download, "ASKED_IN_ALL_S", 0.2)
    away = threading.Event()
    away.set()
    with served(sealed, lambda _, request: "503" if view_of(request) == 1 and away.is_set() else None) as served_now:
        address, flaky = served_now
        flaky.retry_after = "1"
        archive = stream_archive(address)
        archive.arrivals.expect([1])
        while 1 not in archive.arrivals._failed:
            time.sleep(0.05)
        said: list[str] = []
        with pytest.raises(Refused, match=r"cannot fetch .*503.*attempts in") as refused:
            archive.arrivals.wait(1, notify=said.append)
        assert "\n" not in str(refused.value)
        assert said[0] == f"waiting for view 1 of {address}"
        away.clear()
        assert np.array_equal(archive.logits(1), stored_logits(1)), "at once, not after a pause"
        archive.arrivals.close()


def test_a_wait_can_be_stopped_and_leaves_nothing(
    sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[], set[str]]
):
    monkeypatch.setattr(arrivals, "CLOSING_S", 60.0)
    with served(sealed, lambda _, request: "silent" if view_of(request) == 0 else None) as (address, flaky):
        archive = stream_archive(address)
        with pytest.raises(Refused, match=r"the wait for view 0 of .* was stopped"):
            archive.arrivals.wait(0, notify=lambda _: None, stopped=lambda: bool(views_asked(flaky)))
        archive.arrivals.close()
        assert not list((tmp_path / "cache").rglob("*.partial"))
        assert "fetch views" not in threads()


READ = "import sys; from redistill_cache import stream_archive as s; print(s(sys.argv[1]).logits(1).sum().item())"


@pytest.mark.slow
def test_processes_of_a_machine_share_a_view(sealed: Path):
    with served(sealed, lambda *_: "slow") as (address, flaky):
        command = [sys.executable, "-c", READ, address]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        outs = [process.communicate(timeout=60) for process in both]
        assert [process.returncode for process in both] == [0, 0], outs
        assert outs[0][0] == outs[1][0] == f"{stored_logits(1).sum().item()}\n"
        sent = [request.path for request in flaky.requests if view_of(request) is not None]
        assert set(map(view_of, flaky.requests)) == {None, 1}
        assert len(sent) == len(set(sent))


def test_views_that_are_here_need_no_server(sealed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "FIRST_PATIENCE_S", 0.0)
    with served(sealed) as (address, flaky):
        archive = stream_archive(address)
        archive.logits(0)
        archive.arrivals.close()
        before = len(flaky.requests)
        pinned = stream_archive(f"{address}#sha256={archive.id}")
        assert np.array_equal(pinned.logits(0), stored_logits(0))
        assert len(flaky.requests) == before
        flaky.leave()
        said: list[str] = []
        again = stream_archive(address, notify=said.append)
        assert "using the views that were fetched before" in said[0]
        assert np.array_equal(again.logits(0), stored_logits(0))
    monkeypatch.setenv("REDISTILL_OFFLINE", "1")
    offline = stream_archive(address)
    assert np.array_equal(offline.logits(0), stored_logits(0))
    with pytest.raises(Refused, match="is not on this machine, and --offline contacts no server"):
        offline.logits(1)
    for archive in (again, offline):
        archive.arrivals.close()


def test_views_without_room_are_refused_before_they_are_fetched(sealed: Path, monkeypatch: pytest.MonkeyPatch):
    with served(sealed) as (address, flaky):
        archive = stream_archive(address)
        archive.arrivals.require_room([0, 1, 2])
        size = sum(entry.size for name, entry in archive.state.files.items() if layout.view_of_file(name) == 1)
        usage = shutil.disk_usage(sealed)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))
        archive.arrivals.require_room([1])
        with pytest.raises(Refused, match=r"needs \d+ bytes, \d+ are free"):
            archive.arrivals.require_room([0, 1])
        assert not views_asked(flaky)


def test_what_fails_in_the_background_is_tried_again(sealed: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download, "PATIENCE_S", 0.0)
    monkeypatch.setattr(arrivals, "AGAIN_S", 0.05)
    tries: list[str] = []

    def fault(_: int, request: Request) -> str | None:
        if view_of(request) != 1:
            return None
        tries.append(request.path)
        return "503" if len(tries) < 30 else None

    with served(sealed, fault) as (address, _):
        archive = stream_archive(address)
        archive.arrivals.expect([1])
        deadline = time.monotonic() + 240
        while not archive.arrivals.here(1) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert archive.arrivals.here(1)
        archive.arrivals.close()
