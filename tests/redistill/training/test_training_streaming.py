"""Runs on an archive whose views are fetched meanwhile: the same students, no view too early, none more than once."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from redistill_cache import download, fetch_archive, layout, stream_archive
from redistill_cache.errors import OutOfRange, Refused
from redistill_cache.packing import pack

from redistill.interrupts import Interrupted
from redistill.training import train
from redistill.training.checkpoint import LAST
from tests.flaky_server import Flaky, Request, serving
from tests.redistill.sources.test_sources_stream import wait_until
from tests.redistill.training.runs import InterruptAt, history, weights
from tests.redistill.training.train_process import SECONDS, rank_environments, start, start_ranks
from tests.small_archive import DATA, cache

PLAIN = "--student demo:tiny --lr 0.05 --warmup-epochs 0.5 --workers 0 --batch-size 32 --log csv --device cpu"
Fault = Callable[[int, Request], str | None]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def cache_folder(tmp_path: Path) -> dict[str, str]:
    """For processes that are forked from a server with the environment of an earlier test."""
    return {"XDG_CACHE_HOME": str(tmp_path / "cache")}


@contextmanager
def served(archive: Path, fault: Fault = lambda *_: None) -> Iterator[tuple[str, Flaky]]:
    files = {f"x/{path.relative_to(archive)}": path.read_bytes() for path in archive.rglob("*") if path.is_file()}
    with serving(Flaky(files, fault)) as flaky:
        yield f"{flaky.address}/x", flaky


def view_of(request: Request) -> int | None:
    name = request.path.removeprefix("/x/")
    return int(name[5:9]) if name.startswith("view-") else layout.view_of_file(name)


def views_asked(flaky: Flaky) -> list[int]:
    return list(dict.fromkeys(view for view in map(view_of, flaky.requests) if view is not None))


def sent_once(flaky: Flaky) -> bool:
    paths = [request.path for request in flaky.requests if view_of(request) is not None]
    return len(paths) == len(set(paths))


@pytest.fixture
def local(options, tmp_path: Path) -> Callable[..., Path]:
    """The run on the local archive, to compare with."""

    def run(**changed) -> Path:
        train(options(out=tmp_path / "local", **changed))
        return tmp_path / "local"

    return run


@pytest.mark.timeout(900)
def test_training_begins_with_the_first_view_and_waits_for_the_next(options, archive: Path, tmp_path: Path, local):
    """The server holds view 1 back until the run, after its first epoch, says that it waits for it."""
    packed = tmp_path / "a.redistill"
    pack(archive, packed)
    out, output = tmp_path / "run", tmp_path / "output.txt"

    def fault(_: int, request: Request) -> None:
        deadline = time.monotonic() + SECONDS
        while view_of(request) == 1 and "waiting for view 1" not in output.read_text():
            assert time.monotonic() < deadline, "the run does not say that it waits"
            time.sleep(0.02)

    with served(packed, fault) as (address, flaky):
        arguments = ("train", DATA, "--archive", address, "--out", out, "--epochs", 3, *PLAIN.split())
        process = start(*arguments, output=output, environment=cache_folder(tmp_path))
        process.join(SECONDS)
        process.kill()
    said = output.read_text()
    assert process.exitcode == 0, said
    epoch, wait = said.index("epoch   1"), said.index(f"waiting for view 1 of {address}\n")
    assert epoch < wait < said.index("epoch   2")
    assert said.count("waiting for view 1") == 1
    assert sent_once(flaky)
    expected = local()
    assert weights(out) == weights(expected)
    assert history(out) == history(expected)


@pytest.mark.parametrize("form", ["tree", pytest.param("packed", marks=pytest.mark.slow)])
def test_only_the_views_of_the_run_are_fetched(options, archive: Path, tmp_path: Path, form: str):
    """At most 1.02 times the bytes of these views; of the archive as it is, also of what is not of a view."""
    source = archive
    if form == "packed":
        source = tmp_path / "a.redistill"
        pack(archive, source)
    with served(source) as (address, flaky):
        train(options(epochs=2), archive=stream_archive(address))
        assert views_asked(flaky) == [0, 1]
        counted = (0, 1, None) if form == "tree" else (0, 1)
        used = sum(len(data) for name, data in flaky.files.items() if view_of(Request(f"/{name}", {}, 0.0)) in counted)
        assert sum(request.sent for request in flaky.requests if view_of(request) in counted) <= 1.02 * used


@pytest.mark.slow
def test_rows_of_teachers_that_the_run_does_not_use_are_not_fetched(options, archive: Path, tmp_path: Path, local):
    two = shutil.copytree(archive, tmp_path / "two")
    cache(two, views=3, teacher="demo:tiny?num_classes=8&weights=random", teacher_name="other")
    expected = local(workers=2)
    with served(two) as (address, flaky):
        train(options(teachers=("small",), workers=2), archive=stream_archive(address))
        asked = {layout.teacher_of_file(request.path.removeprefix("/x/")) for request in flaky.requests}
    assert asked == {None, "small"}
    assert weights(tmp_path / "run") == weights(expected)


@pytest.mark.slow
def test_a_copy_with_one_teacher_trains_as_its_archive_does(options, archive: Path, tmp_path: Path, local):
    two, copy = shutil.copytree(archive, tmp_path / "two"), tmp_path / "copy"
    cache(two, views=3, teacher="demo:tiny?num_classes=8&weights=random", teacher_name="other")
    expected = local()
    fetch_archive(str(two), copy, teachers=["other"])
    with pytest.raises(OutOfRange, match=r"copy without teacher 'small' .*/copy --teachers small$"):
        train(options(out=expected, archive=copy))  # it was trained with small
    shutil.rmtree(copy)
    fetch_archive(str(two), copy, teachers=["small"])
    train(options(archive=copy))
    assert weights(tmp_path / "run") == weights(expected)


def test_a_resumed_run_fetches_the_view_of_its_epoch_first(options, archive: Path, tmp_path: Path, local):
    """On a machine that has nothing yet; and after a dead server, which is one line."""
    expected = local()
    settings = {"checkpoint_minutes": 0.0}
    with served(archive) as (address, _), pytest.raises(Interrupted):
        train(options(**settings), InterruptAt(7), archive=stream_archive(address))  # in the second epoch
    wait_until(lambda: "fetch views" not in {thread.name for thread in threading.enumerate()})  # else it writes there
    shutil.rmtree(tmp_path / "cache")
    with served(archive) as (address, flaky):
        train(options(**settings), archive=stream_archive(address))
        assert views_asked(flaky) == [1, 2]
    assert weights(tmp_path / "run") == weights(expected)


@pytest.mark.slow
def test_a_server_that_dies_ends_the_run_when_its_view_is_needed(
    options, archive: Path, tmp_path: Path, local, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(download, "PATIENCE_S", 0.2)
    monkeypatch.setattr(download, "WAIT_S", 0.01)
    expected = local()
    with served(archive, lambda _, request: "503" if view_of(request) == 1 else None) as (address, _):
        with pytest.raises(Refused, match=r"cannot fetch .*503") as refused:
            train(options(), archive=stream_archive(address))
        assert "\n" not in str(refused.value)
    assert len(history(tmp_path / "run")) == 1
    with served(archive) as (address, flaky):
        train(options(), archive=stream_archive(address))
        assert 0 not in views_asked(flaky)
    assert weights(tmp_path / "run") == weights(expected)


@pytest.mark.slow
def test_views_that_come_later_are_compared_as_well(options, archive: Path, tmp_path: Path, monkeypatch):
    from redistill.training import prepare

    compared: list[object] = []
    real = prepare.check_canaries
    monkeypatch.setattr(prepare, "check_canaries", lambda *a, views: compared.append(views) or real(*a, views=views))
    with served(archive) as (address, _):
        train(options(epochs=4), archive=stream_archive(address))
    assert compared == [[1], [2]]


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_download_each_view_once(options, archive: Path, tmp_path: Path):
    plain = ("train", DATA, "--epochs", 3, *PLAIN.split())
    with served(archive, lambda *_: "slow") as (address, flaky):
        for name, location in (("streamed", address), ("whole", archive)):
            out = tmp_path / name
            arguments = (*plain, "--archive", location, "--out", out)
            ranks = start_ranks(2, *arguments, output=tmp_path / f"{name}.txt", environment=cache_folder(tmp_path))
            for process in ranks:
                process.join(SECONDS)
                process.kill()
            assert [process.exitcode for process in ranks] == [0, 0], (tmp_path / f"{name}.txt-0").read_text()
        assert sent_once(flaky)
    assert weights(tmp_path / "streamed") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_ranks_may_differ_in_what_is_here(archive: Path, tmp_path: Path):
    """As on two machines: rank 0 fetches views, rank 1 has all of them."""
    out = tmp_path / "run"
    with served(archive) as (address, flaky):
        fetch_archive(address)
        before = len(flaky.requests)
        arguments = ("train", DATA, "--archive", address, "--out", out, "--epochs", 3, *PLAIN.split())
        ranks = [
            start(
                *arguments, output=tmp_path / f"{rank}.txt", environment={**of_rank, **cache_folder(tmp_path / folder)}
            )
            for rank, (of_rank, folder) in enumerate(zip(rank_environments(2), ("empty", ""), strict=True))
        ]
        for process in ranks:
            process.join(SECONDS)
            process.kill()
        assert [process.exitcode for process in ranks] == [0, 0], (tmp_path / "0.txt").read_text()
        assert {view_of(request) for request in flaky.requests[before:]} == {None, 0, 1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_with_what_it_has(options, archive: Path, tmp_path: Path, local, workers: int):
    """Killed while view 1 is half here and the first epoch is done."""
    expected = local(workers=workers)
    out = tmp_path / "run"
    hold = [True]

    def fault(_: int, request: Request) -> str | None:
        return "silent" if hold[0] and view_of(request) == 1 and "/q/" in request.path else None

    with served(archive, fault) as (address, flaky):
        plain = PLAIN.replace("--workers 0", f"--workers {workers}").split()
        arguments = ("train", DATA, "--archive", address, "--out", out, "--epochs", 3, *plain)
        process = start(*arguments, output=tmp_path / "output.txt", environment=cache_folder(tmp_path))
        deadline = time.monotonic() + SECONDS
        while not (out / LAST).exists() or 1 not in views_asked(flaky):
            assert time.monotonic() < deadline
            assert process.is_alive(), (tmp_path / "output.txt").read_text()
            time.sleep(0.02)
        process.kill()
        process.join()
        hold[0] = False
        before = len(flaky.requests)
        again = start(*arguments, output=tmp_path / "again.txt", environment=cache_folder(tmp_path))
        again.join(SECONDS)
        again.kill()
        assert again.exitcode == 0, (tmp_path / "again.txt").read_text()
        later = [view_of(request) for request in flaky.requests[before:]]
        assert 0 not in later
    assert weights(out) == weights(expected)
    assert not list((tmp_path / "cache").rglob("*.partial"))
