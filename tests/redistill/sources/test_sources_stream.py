"""Streamed tars: the order of an epoch, the bounded cache, servers that fail, and tars that change."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redistill_cache import download
from redistill_cache.errors import Refused, UsageError
from redistill_cache.locks import locked

import redistill
from redistill.sources.index import index_source
from redistill.sources.stream import GIB, StreamSource, TarsAhead
from redistill.training.feed import epoch_batches, images_before, rank_rows
from redistill.views.stream_order import grouped_order
from tests.flaky_server import Flaky, serving
from tests.hub_server import Hub, Repository, hub_server
from tests.redistill.sources.test_sources_wds import picture
from tests.s3_server import s3_client, s3_server

PER_TAR = 6


def tar_of(numbers: range, label: int = 5) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in numbers:
            for name, content in (
                (f"x/{number:05d}.png", picture(number)),
                (f"x/{number:05d}.cls", b"%d" % (number % label)),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def server() -> Iterator[Flaky]:
    """Eight tars of six images."""
    with serving(Flaky({f"t{i}.tar": tar_of(range(PER_TAR * i, PER_TAR * (i + 1))) for i in range(8)})) as flaky:
        yield flaky


def spec(server: Flaky, options: str = "stream=1&window=2", tars: str = "{0..7}") -> str:
    return f"wds:{server.address}/t{tars}.tar?{options}"


def opened(server: Flaky, *, tars_in_cache: float = 4, options: str = "stream=1&window=2") -> StreamSource:
    largest = max(map(len, server.files.values()))
    source = redistill.open_source(spec(server, options), stream_cache=tars_in_cache * largest / GIB)
    assert isinstance(source, StreamSource)
    return source


def requested(server: Flaky) -> Counter[str]:
    return Counter(request.path for request in server.requests)


# -- order ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 10_000),
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any),
    window=st.integers(1, 12),
    batch_size=st.integers(3, 50),
)
def test_the_order_of_an_epoch(seed: int, epoch: int, counts: list[int], window: int, batch_size: int):
    tar_of_rows = np.repeat(np.arange(len(counts)), counts)
    rows = np.random.default_rng(0).permutation(2 * len(tar_of_rows))[: len(tar_of_rows)]
    order = grouped_order(seed, epoch, rows, tar_of_rows, window)
    again = grouped_order(seed, epoch, rows.copy(), tar_of_rows.copy(), window)
    assert np.array_equal(order.rows, again.rows)
    assert np.array_equal(np.sort(order.rows), np.sort(rows))  # each row once
    # Each tar is in one group, of at most `window`, and its rows are within the group.
    tars = np.concatenate(order.tars)
    assert np.array_equal(np.sort(tars), np.flatnonzero(counts))
    assert max(map(len, order.tars)) <= window
    tar_of_row = dict(zip(rows.tolist(), tar_of_rows.tolist(), strict=True))
    for position, row in enumerate(order.rows.tolist()):
        assert tar_of_row[row] in order.tars[order.group_at(position)]
    # The same batches for any number of ranks, and positions that a resumed run can count.
    batches = epoch_batches(order.rows, batch_size)
    for ranks in (1, 2, 3):
        for batch in batches:
            assert np.array_equal(
                np.sort(np.concatenate([rank_rows(batch, r, ranks) for r in range(ranks)])), np.sort(batch)
            )
    for number in range(len(batches) + 1):
        assert images_before(number, len(batches), len(rows)) == sum(map(len, batches[:number]))


def test_the_order_depends_on_seed_and_epoch_and_mixes_the_tars_of_a_window():
    rows = np.arange(400)
    one = grouped_order(1, 2, rows, rows // 10, 4)
    for other in (grouped_order(2, 2, rows, rows // 10, 4), grouped_order(1, 3, rows, rows // 10, 4)):
        assert not np.array_equal(one.rows, other.rows)
        assert [set(tars) for tars in one.tars] != [set(tars) for tars in other.tars]
    assert all(len(set((one.rows[start : start + 20] // 10).tolist())) >= 3 for start in range(0, 400, 40))
    assert one.rows[:5].tolist() == [378, 372, 371, 327, 363], "released runs are resumed in this order"


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_tar_is_read_once_to_index_it_and_once_each_time_it_is_used(server: Flaky, cache: Path):
    source = opened(server)
    assert requested(server) == {f"/t{i}.tar": 1 for i in range(8)}
    index = index_source(source)
    assert (index.reused, index.sizes.tolist(), index.labels.tolist()) == (
        *(48, [[8, 6]] * 48),
        [i % 5 for i in range(48)],
    )
    assert list(index.keys[:2]) == ["x/00000", "x/00001"]
    server.requests.clear()
    again = opened(server)  # the index is kept
    assert np.array_equal(index_source(again).digests, index.digests)
    assert requested(server) == {}
    biggest, done = [0], threading.Event()

    def sizes() -> dict[str, int]:
        found = {}
        for path in (cache / "streamed").iterdir():
            with suppress(FileNotFoundError):
                found[path.name] = path.stat().st_size
        return found

    def watch() -> None:
        before: dict[str, int] = {}
        while not done.is_set():
            now = sizes()
            if now == before:  # all of these files were there together, between the two listings
                biggest[0] = max(biggest[0], sum(now.values()))
            before = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    order = grouped_order(0, 0, np.arange(48), again.tar_of.astype(np.int64), 2)
    try:
        with TarsAhead(again, [tars.tolist() for tars in order.tars]) as ahead:
            for position, i in enumerate(order.rows.tolist()):
                ahead.enter(order.group_at(position))
                assert again.sample(i).payload == picture(i)
        wait_until(lambda: biggest[0] > 0)  # the last tars stay, so the watcher counts them however late it is
    finally:
        done.set()
        watcher.join()
    assert max(requested(server).values()) == 1
    assert 0 < biggest[0] <= again.cache.limit
    assert len(list((cache / "streamed").glob("*.partial"))) == 0


def test_a_tar_gets_its_name_while_nobody_counts_the_files(server: Flaky, cache: Path):
    """Else its partial file would be listed before it, and looked for after it, and the tar would not be counted."""
    source = opened(server)
    for path in (cache / "streamed").iterdir():
        path.unlink()
    server.requests.clear()
    counts = threading.Event()

    def fault(number: int, _: object) -> str | None:
        if number == 0:
            return "reset"
        assert counts.wait(30)
        return None

    server.fault = fault
    reader = threading.Thread(target=source.sample, args=(0,))
    reader.start()
    wait_until(lambda: len(server.requests) == 2)
    with locked(cache / "streamed", "counts the files", print):
        counts.set()
        tar, folder = server.files["t0.tar"], cache / "streamed"
        wait_until(lambda: [path.read_bytes() for path in folder.glob("*-t0.tar.*.partial")] == [tar])
        time.sleep(0.3)
        assert not list(folder.glob("*-t0.tar"))
    reader.join()
    assert len(list((cache / "streamed").glob("*-t0.tar"))) == 1


def test_tars_of_batches_that_are_loaded_ahead_are_fetched_as_far_as_they_fit(
    server: Flaky, cache: Path, caplog: pytest.LogCaptureFixture
):
    source = opened(server, tars_in_cache=5, options="stream=1&window=1")
    caplog.clear()
    for path in (cache / "streamed").iterdir():
        path.unlink()
    server.requests.clear()

    def here(start: int, last: int) -> bool:
        return {path.name.rpartition("-")[2] for path in (cache / "streamed").iterdir()} == {
            f"t{i}.tar" for i in range(start, last + 1)
        }

    def told() -> list[str]:
        return [text for text in caplog.messages if "the batches that are loaded ahead need tars of" in text]

    with TarsAhead(source, ([i] for i in range(8))) as ahead:
        for used, expected, last in ((0, 0, 1), (0, 1, 1), (0, 3, 3), (0, 4, 4)):
            ahead.enter(used)
            ahead.expect(expected)
            wait_until(partial(here, 0, last))
        assert not told()
        for _ in range(2):
            ahead.expect(6)
        assert len(told()) == 1
        ahead.enter(2)
        ahead.expect(9)
        wait_until(partial(here, 2, 6))
        ahead.enter(9)
    assert max(requested(server).values()) == 1


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_without_ahead_the_samples_are_the_same_and_the_disk_is_bounded(server: Flaky, cache: Path):
    source = pickle.loads(pickle.dumps(opened(server)))
    for i in np.random.default_rng(0).permutation(48).tolist():
        assert source.sample(i).payload == picture(i)
        assert sum(path.stat().st_size for path in (cache / "streamed").iterdir()) <= source.cache.limit
    limit = source.cache.limit
    (cache / "streamed" / "left.0123.partial").write_bytes(bytes(limit))  # by a process that was killed
    [(cache / "streamed" / name).unlink() for name in {p.name for p in (cache / "streamed").glob("*.tar")}]
    assert source.sample(0).payload == picture(0)
    assert not list((cache / "streamed").glob("*.partial"))


def test_single_images_are_read_without_their_tars(server: Flaky, cache: Path):
    opened(server)
    for path in (cache / "streamed").iterdir():
        path.unlink()
    source = opened(server).by_parts().loaded([40, 1, 7, 1])
    assert [source.sample(i).payload for i in (1, 7, 40, 13)] == [picture(i) for i in (1, 7, 40, 13)]
    ranges = [request.headers["Range"].removeprefix("bytes=").split("-") for request in server.requests[-4:]]
    asked = sorted(int(last) - int(first) + 1 for first, last in ranges)
    assert asked == sorted(len(picture(i)) for i in (1, 7, 40, 13))
    assert not list((cache / "streamed").iterdir())
    server.fault = lambda *_: "200 for 206"  # a server without ranges
    assert source.sample(25).payload == picture(25)


def test_a_cache_that_is_too_small_is_refused(server: Flaky):
    opened(server)
    with pytest.raises(Refused, match=r"two windows of 4 tars have up to .*; add window=2, or allow at least"):
        opened(server, options="stream=1&window=4")
    with pytest.raises(Refused, match=r"two windows of 1 tars .*; allow at least"):
        opened(server, tars_in_cache=1.5, options="stream=1&window=1")
    server.files = {name: data for name, data in server.files.items() if name < "t4"}
    with pytest.raises(Refused, match=r"a tar of at least .*, and --stream-cache is") as refused:
        redistill.open_source(spec(server, "stream=1&labels=none"), stream_cache=100 / GIB)
    assert "\n" not in str(refused.value)


def test_tars_are_streamed_by_default_if_they_are_larger_than_the_limit(server: Flaky, cache: Path):
    largest = max(map(len, server.files.values()))
    source = redistill.open_source(spec(server, "window=1"), stream_cache=4 * largest / GIB)
    assert isinstance(source, StreamSource)
    assert max(requested(server).values()) == 1
    assert not list((cache / "tars").glob("*.tar"))
    kept = redistill.open_source(spec(server, "labels=none", "{0..1}"), stream_cache=4 * largest / GIB)
    assert not isinstance(kept, StreamSource)
    with pytest.raises(UsageError, match="window= mixes the images of streamed tars; add stream=1"):
        redistill.open_source(spec(server, "window=2&stream=0", "{0..1}"))


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_missing_tars_are_counted_and_refused(server: Flaky):
    del server.files["t3.tar"], server.files["t6.tar"]
    with pytest.raises(Refused, match=r"2 of 8 tars are missing; the first: .*t3\.tar.*404") as refused:
        opened(server)
    assert "\n" not in str(refused.value)
    server.files |= {f"t{i}.tar": tar_of(range(PER_TAR * i, PER_TAR * (i + 1))) for i in (3, 6)}
    server.requests.clear()
    opened(server)
    assert requested(server) == {"/t3.tar": 1, "/t6.tar": 1}  # the pass continues


def test_a_dead_server_ends_in_one_line(server: Flaky, cache: Path, monkeypatch: pytest.MonkeyPatch):
    for patience in ("FIRST_PATIENCE_S", "PATIENCE_S"):
        monkeypatch.setattr(download, patience, 0.0)
    source = opened(server)
    for path in (cache / "streamed").iterdir():
        path.unlink()
    server.fault = lambda *_: "503"
    for use in (source.sample, source.by_parts().sample):
        with pytest.raises(Refused, match=r"t4\.tar") as refused:
            use(PER_TAR * 4)
        assert "\n" not in str(refused.value)
    with TarsAhead(source, [[0, 1], [2, 3]]):  # fetching ahead fails in silence, and leaves nothing
        time.sleep(0.2)
    assert not list((cache / "streamed").iterdir())


@pytest.mark.parametrize("size_changes", [True, False])
def test_a_tar_that_changes_is_refused_and_indexed_again(server: Flaky, cache: Path, size_changes: bool):
    before = index_source(opened(server))
    numbers = range(500, 500 + PER_TAR + 20 * size_changes)
    server.files["t2.tar"] = tar_of(numbers)
    for path in (cache / "streamed").iterdir():
        path.unlink()
    source = opened(server)
    if size_changes:
        for use in (source.sample, source.by_parts().sample):
            with pytest.raises(
                Refused, match=r"t2\.tar: now has \d+ bytes, and had \d+ .*; start the run again"
            ) as refused:
                use(2 * PER_TAR)
            assert "\n" not in str(refused.value)
    else:
        source.forget(2 * PER_TAR)
    server.requests.clear()
    after = index_source(opened(server))
    assert requested(server) == {"/t2.tar": 1}
    assert len(after) == len(before) + 20 * size_changes
    assert not np.array_equal(after.digests[12:18], before.digests[12:18])
    assert np.array_equal(after.digests[:12], before.digests[:12])


def test_a_shared_index_needs_no_pass(server: Flaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = index_source(opened(server), save_to=tmp_path / "i.npz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-machine"))
    server.requests.clear()
    options = f"stream=1&window=2&index={tmp_path / 'i.npz'}"
    source = opened(server, options=options)
    shared = index_source(source)
    assert (shared.reused, shared.digests.tolist()) == (48, index.digests.tolist())
    assert requested(server) == {}
    assert source.sample(30).payload == picture(30)
    with pytest.raises(Refused, match=r"expected an index of 7 streamed tars at .*i\.npz, found another file"):
        redistill.open_source(spec(server, options, "{0..6}"))


def test_a_list_file_names_tars(server: Flaky, tmp_path: Path):
    listed = tmp_path / "tars.txt"
    listed.write_text("# the first two\n" + "".join(f"{server.address}/t{i}.tar\n" for i in range(2)))
    assert len(redistill.open_source(f"wds:{listed}?stream=1")) == 2 * PER_TAR
    (tmp_path / "here.tar").write_bytes(server.files["t0.tar"])
    listed.write_text("here.tar\n")
    local = redistill.open_source(f"wds:{listed}?stream=1&window=3")
    assert (len(local), local.window) == (PER_TAR, 3)
    for line in ("pipe:touch x", "file:///etc/passwd", "ftp://host/a.tar"):
        listed.write_text(line + "\n")
        with pytest.raises(UsageError, match="is not read"):
            redistill.open_source(f"wds:{listed}?stream=1")
    listed.write_text("\n")
    with pytest.raises(Refused, match="names no tars"):
        redistill.open_source(f"wds:{listed}")


# -- other kinds of addresses -----------------------------------------------------------------------------------------

TARS = {f"t{i}.tar": tar_of(range(PER_TAR * i, PER_TAR * (i + 1))) for i in range(4)}


@contextmanager
def in_a_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("moto")
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # it keeps the address of an earlier server
    with s3_server(folder) as environment:
        for name, text in environment.items():
            monkeypatch.setenv(name, text)
        client = s3_client(environment)
        for name, content in TARS.items():
            client.put_object(Bucket="lab", Key=f"set/{name}", Body=content)
        client.close()
        yield "s3://lab/set"


@contextmanager
def on_a_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """In a private repository; the tars are at other addresses, which never see the token."""
    pytest.importorskip("huggingface_hub")
    large = {hashlib.sha256(content).hexdigest(): content for content in TARS.values()}
    files = {f"train/{name}": content for name, content in TARS.items()}
    repositories = {"lab/set": Repository(private=True, commits={"0" * 40: files})}
    monkeypatch.setenv("HF_HOME", str(folder))
    with hub_server(Hub(repositories=repositories, large=large)) as hub:
        for name, text in hub.environment().items():
            monkeypatch.setenv(name, text)
        for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
            monkeypatch.delitem(sys.modules, name)  # it reads the environment once
        yield "hf://datasets/lab/set@main/train"
        assert {token for _, path, token in hub.requests if path.startswith("/storage")} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("kept", [in_a_bucket, on_a_hub])
def test_tars_in_a_bucket_and_on_a_hub(
    kept: Callable[[Path, pytest.MonkeyPatch], AbstractContextManager[str]],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    room = 2 * max(map(len, TARS.values())) / GIB
    with kept(tmp_path, monkeypatch) as place:
        source = redistill.open_source(f"wds:{place}/t{{0..3}}.tar?stream=1&window=1", stream_cache=room)
        assert isinstance(source, StreamSource)
        index = index_source(source)
        assert index.labels.tolist() == [i % 5 for i in range(4 * PER_TAR)]
        parts = source.by_parts().loaded([0, 8, 23])
        assert [parts.sample(i).payload for i in (0, 8, 23)] == [picture(i) for i in (0, 8, 23)]
        with TarsAhead(source, [[i] for i in range(4)]) as ahead:
            for i in range(4 * PER_TAR):
                ahead.enter(i // PER_TAR)
                assert source.sample(i).payload == picture(i)
                assert sum(path.stat().st_size for path in (cache / "streamed").iterdir()) <= source.cache.limit
        with pytest.raises(Refused, match=rf"1 of 5 tars are missing; the first: .*{place}/t4\.tar"):
            redistill.open_source(f"wds:{place}/t{{0..4}}.tar?stream=1&window=1", stream_cache=room)
    again = redistill.open_source(f"wds:{place}/t{{0..3}}.tar?stream=1&window=1", stream_cache=room)
    assert np.array_equal(index_source(again).digests, index.digests)  # without the server


@pytest.mark.slow
def test_parts_of_tars_in_a_bucket_are_read_without_the_rest(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    """Packages for buckets read ahead, s3fs 50 MiB."""
    with in_a_bucket(tmp_path, monkeypatch) as place:
        source = redistill.open_source(f"wds:{place}/t{{0..3}}.tar?stream=1&window=1", stream_cache=1)
        for path in (cache / "streamed").iterdir():
            path.unlink()
        import s3fs

        received, fetch = [], s3fs.S3File._fetch_range

        def recorded(self: object, start: int, end: int) -> bytes:
            data: bytes = fetch(self, start, end)
            received.append(len(data))
            return data

        monkeypatch.setattr(s3fs.S3File, "_fetch_range", recorded)
        parts = source.by_parts().loaded([0, 8, 23])
        assert [parts.sample(i).payload for i in (0, 8, 23)] == [picture(i) for i in (0, 8, 23)]
    assert sum(received) == sum(len(picture(i)) for i in (0, 8, 23))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_tars_by_braces_and_by_a_list(tmp_path: Path):
    """Each is read once; opened again, none is."""
    count = 10_000
    with serving(Flaky({f"{i:04d}.tar": tar_of(range(i, i + 1)) for i in range(count)})) as server:
        (tmp_path / "tars.txt").write_text("".join(f"{server.address}/{i:04d}.tar\n" for i in range(count)))
        options = "stream=1&window=100"
        by_braces = redistill.open_source(f"wds:{server.address}/{{0000..9999}}.tar?{options}", stream_cache=0.004)
        assert (len(by_braces), max(requested(server).values())) == (count, 1)
        server.requests.clear()
        by_list = redistill.open_source(f"wds:{tmp_path / 'tars.txt'}?{options}", stream_cache=0.004)
        assert index_source(by_list).reused == count
        assert requested(server) == {}
        assert by_list.sample(9_876).payload == picture(9_876)
