"""Reading: values, order, processes and threads, and one-line errors."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redistill_cache.machine
from hypothesis import given, settings
from hypothesis import strategies as st
from redistill_cache import Archive, ArchiveWriter, open_archive
from redistill_cache.errors import (
    Damaged,
    Incomplete,
    NewerFormat,
    NotAnArchive,
    OutOfRange,
    Refused,
    UsageError,
)
from redistill_cache.rows import row_out_of_range
from redistill_cache.strict_json import canonical

from tests.attacks.forge import documents, forge
from tests.tiny_archive import (
    SPEC,
    TEACHER,
    block_data,
    canaries,
    features,
    fill,
    make,
    samples,
    stored_logits,
    view_params,
)

N = SPEC.num_samples


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "a.redistill.zarr"
    make(path, teachers=("tiny", "second"))
    return path


@pytest.fixture
def archive(whole: Path) -> Archive:
    return open_archive(whole)


@pytest.fixture(autouse=True)
def _fresh_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def refused(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


# -- values -----------------------------------------------------------------------------------------------------------


def test_everything_written_is_read_back(archive: Archive):
    expected = samples()
    assert list(archive.keys) == expected["keys"]
    assert np.array_equal(archive.labels, expected["labels"])
    assert np.array_equal(archive.digests, expected["digests"])
    assert np.array_equal(archive.sizes, expected["sizes"])
    assert archive.class_names == SPEC.class_names
    assert (archive.num_samples, archive.num_views, archive.num_classes) == (50, 3, 6)
    for view in range(3):
        for name in ("tiny", "second"):
            assert np.array_equal(archive.logits(view, teacher=name), stored_logits(view, teacher=name))
            assert np.array_equal(archive.features(view, layer="layer4.1", teacher=name), features(view, teacher=name))
        for name, values in archive.view_params(view).items():
            assert np.array_equal(values, view_params(view)[name])
        rows, pixels = archive.canaries(view)
        assert np.array_equal(rows, canaries(view)["row"])
        assert np.array_equal(pixels, canaries(view)["pixels"])


@given(rows=st.lists(st.integers(0, N - 1), max_size=80), view=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_rows_are_returned_in_the_requested_order(whole: Path, rows: list[int], view: int):
    archive = open_archive(whole)
    assert np.array_equal(archive.logits(view, rows, teacher="tiny"), stored_logits(view)[rows])
    for name, values in archive.view_params(view, rows).items():
        assert np.array_equal(values, view_params(view)[name][rows])
    packed = archive.load_view(view, "tiny")
    assert np.array_equal(packed.decode(np.array(rows, np.int64)), stored_logits(view)[rows])


def test_an_empty_list_of_rows(archive: Archive):
    assert archive.logits(0, [], teacher="tiny").shape == (0, 6)
    assert archive.features(0, [], layer="layer4.1", teacher="tiny").shape == (0, 4)
    assert {name: values.shape for name, values in archive.view_params(0, []).items()} == {"crop": (0, 4), "flip": (0,)}


def test_rows_and_views_may_be_of_any_integer_type(archive: Archive):
    expected = stored_logits(1)[[3, 1, 4]]
    for rows in ((3, 1, 4), np.array([3, 1, 4], np.uint8), np.array([3, 1, 4], np.int32), range(3, 2, -1)):
        logits = archive.logits(np.int64(1), rows, teacher="tiny")  # type: ignore[arg-type]
        assert np.array_equal(logits, expected[: len(logits)])


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [-1, N, 2**40, -(2**40)])
def test_rows_out_of_range(archive: Archive, row: int):
    for call in (lambda: archive.logits(0, [0, row], teacher="tiny"), lambda: archive.view_params(0, [row])):
        refused(OutOfRange, f"rows 0 to 49, requested row {row}", call)


@pytest.mark.parametrize("rows", [5, [0.5], ["a"], [[1]], [True], [None], [2**80]])
def test_rows_that_are_not_integers(archive: Archive, rows: object):
    refused(UsageError, "rows must be a list of integers", lambda: archive.logits(0, rows, teacher="tiny"))


@pytest.mark.parametrize("view", [-1, 3, 2**40])
def test_views_out_of_range(archive: Archive, view: int):
    calls: list[Callable[[], object]] = [
        lambda: archive.logits(view, [0], teacher="tiny"),
        lambda: archive.view_params(view, []),
        lambda: archive.canaries(view),
        lambda: archive.load_view(view, "tiny"),
        lambda: archive.rows_available(view, "tiny"),
    ]
    for call in calls:
        refused(OutOfRange, f"views 0 to 2, requested view {view}", call)


@pytest.mark.parametrize("view", [0.5, "0", None, [0]])
def test_views_that_are_not_integers(archive: Archive, view: Any):
    refused(UsageError, "a view is an integer", lambda: archive.logits(view, [0], teacher="tiny"))


def test_errors_list_the_teachers_and_signals(archive: Archive):
    refused(OutOfRange, "has 2 teachers; name one of: second, tiny", lambda: archive.logits(0))
    refused(OutOfRange, "no teacher 'big'; teachers: second, tiny", lambda: archive.logits(0, teacher="big"))
    wrong = lambda: archive.features(0, layer="fc", teacher="tiny")  # noqa: E731
    refused(OutOfRange, r"no signal 'fc'; signals: logits, layer4\.1", wrong)


def test_paths_that_are_not_an_archive(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/zarr.json").write_text('{"zarr_format":3,"node_type":"group","attributes":{}}')
    for name, message in {
        "nothing": "it does not exist",
        "file": "it is a file",
        "folder": "no zarr.json",
        "other": "has no attribute 'redistill'",
    }.items():
        refused(NotAnArchive, message, lambda name=name: open_archive(tmp_path / name))  # type: ignore[misc]
    refused(UsageError, "'once' or 'full'", lambda: open_archive(tmp_path, verify="never"))  # type: ignore[arg-type]


def test_newer_formats(whole: Path, tmp_path: Path):
    """A newer major version is refused; a newer minor one is read, and its additions are ignored."""
    path = tmp_path / "a"
    shutil.copytree(whole, path)
    root, teachers = documents(path)
    newer = {name: value | {"version": "1.7", "since": 1.7} for name, value in teachers.items()}
    forge(path, root | {"version": "1.7", "since": {"version": "1.7"}}, newer)
    archive = open_archive(path, verify="full")
    assert np.array_equal(archive.logits(2, teacher="tiny"), stored_logits(2))
    forge(path, root | {"since": 1.7}, teachers)
    refused(Refused, "unknown field 'since'", lambda: open_archive(path))
    document = {"zarr_format": 3, "node_type": "group", "attributes": {"redistill": {"format": "redistill-archive"}}}
    document["attributes"]["redistill"]["version"] = "2.0"  # type: ignore[index]
    (path / "zarr.json").write_bytes(canonical(document))
    refused(NewerFormat, "archive format 2.0, this version of redistill reads 1.x; upgrade", lambda: open_archive(path))


def test_reads_larger_than_memory_are_refused(archive: Archive, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(redistill_cache.machine, "memory_limit", lambda: 100)
    refused(Refused, "of memory", lambda: archive.logits(0, teacher="tiny"))
    refused(Refused, "of memory", lambda: archive.load_view(0, "tiny"))
    refused(Refused, "of memory", lambda: archive.digests)


# -- unfinished archives ----------------------------------------------------------------------------------------------


def test_an_unfinished_archive_returns_its_committed_blocks(tmp_path: Path):
    path = tmp_path / "a"
    writer = ArchiveWriter.create(path, SPEC)
    refused(Incomplete, "never sealed", lambda: open_archive(path))
    refused(Incomplete, "has no sample index yet", lambda: open_archive(path, allow_partial=True))
    writer.write_samples(**samples())
    assert not open_archive(path, allow_partial=True).teachers
    writer.add_teacher(TEACHER)
    fill(writer, ["views"])
    for block in writer.missing("teachers/tiny"):
        if (block.view, block.index) in ((0, 1), (0, 3), (1, 0)):
            writer.write(block, *block_data(block))
    archive = open_archive(path, allow_partial=True)
    assert (archive.id, archive.complete) == (None, False)
    assert list(archive.keys) == samples()["keys"]
    rows = archive.rows_available(0)
    assert rows.tolist() == [*range(16, 32), 48, 49]
    assert np.array_equal(archive.logits(0, rows), stored_logits(0)[rows])
    assert not len(archive.rows_available(2))
    refused(Incomplete, "rows 0 to 15 of view 0 are not cached yet", lambda: archive.logits(0))
    refused(Incomplete, "not cached yet", lambda: archive.load_view(0))
    refused(OutOfRange, "canaries of view 0 are not written", lambda: archive.canaries(0))
    assert pickle.loads(pickle.dumps(archive)).rows_available(1).tolist() == list(range(16))


def test_an_archive_without_views_or_canaries(tmp_path: Path):
    bare = replace(SPEC, view_arrays=(), canaries_per_view=0, class_names=None, num_views=1)
    make(tmp_path / "a", bare)
    archive = open_archive(tmp_path / "a")
    assert archive.class_names is None
    assert archive.view_params(0) == {}
    assert np.array_equal(archive.logits(0), stored_logits(0))
    refused(OutOfRange, "no canaries", lambda: archive.canaries(0))


def test_a_relative_path_survives_a_change_of_folder(sealed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(sealed.parent)
    archive = open_archive(sealed.name)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(archive.logits(0), stored_logits(0))
    assert pickle.loads(pickle.dumps(archive)).id == archive.id


# -- processes and threads --------------------------------------------------------------------------------------------


def logits_in_process(archive: Archive, view: int) -> np.ndarray:
    return archive.logits(view, [7, 0, 49], teacher="tiny")


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_an_open_archive_can_be_sent_to_other_processes(archive: Archive, method: str):
    expected = archive.logits(1, [7, 0, 49], teacher="tiny")  # its codec and its threads exist before the fork
    with multiprocessing.get_context(method).Pool(1) as pool:
        logits = pool.apply(logits_in_process, (archive, 1))
    assert np.array_equal(logits, expected)


def test_threads_share_an_archive(archive: Archive):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: archive.logits(i % 3, teacher="tiny"), range(48)))
    for i, logits in enumerate(results):
        assert np.array_equal(logits, stored_logits(i % 3))


def test_unpickling_an_archive_that_changed_is_an_error(archive_copy: Path):
    frozen = pickle.dumps(open_archive(archive_copy))
    writer = ArchiveWriter.resume(archive_copy)
    writer.add_teacher(replace(TEACHER, name="second"))
    fill(writer)
    writer.seal()
    refused(Damaged, "changed while it was open", lambda: pickle.loads(frozen))


def test_a_file_that_changes_while_the_archive_is_open_is_detected(archive_copy: Path):
    archive = open_archive(archive_copy)
    shard = archive_copy / "teachers/tiny/logits/values/c.0.0.0"
    archive.logits(0)
    shard.write_bytes(shard.read_bytes()[::-1])
    refused(Damaged, "does not have the SHA-256", lambda: archive.logits(0))
    shard.unlink()
    refused(Damaged, "is missing", lambda: archive.logits(0))


# -- view loader -----------------------------------------------------------------------------------------------------


def test_the_loader_returns_every_view_in_any_order(archive: Archive):
    plans = [(0, 1), (1, 2), (2, 0), (1, None), (2, 0), (2, 1), (2, 0), (0, 0), (0, 2), (0, 1), (1, None), (1, None)]
    with archive.loader("tiny") as loader:
        for view, then in plans:
            packed = loader.take(view, then)
            assert packed.view == view
            assert np.array_equal(packed.decode(np.arange(N)), stored_logits(view))
        loader.take(1, then=2)  # the context ends while it loads


def test_the_loader_uses_two_sets_of_buffers_in_turn(archive: Archive):
    with archive.loader("tiny") as loader:
        addresses = []
        for epoch in range(8):
            packed = loader.take(epoch % 3, then=(epoch + 1) % 3)
            addresses.append(packed.arrays["values"].ctypes.data)
    assert len(set(addresses)) == 2
    with archive.loader("tiny") as loader:
        unplanned = {loader.take(epoch % 3).arrays["values"].ctypes.data for epoch in range(8)}
    assert len(unplanned) <= 3


def test_the_loader_raises_errors_of_its_thread(archive_copy: Path, threads: Callable[[], set[str]]):
    archive = open_archive(archive_copy)
    shard = archive_copy / "teachers/tiny/logits/values/c.1.0.0"
    good = shard.read_bytes()
    shard.write_bytes(bytes(len(good)))
    with archive.loader() as loader:
        loader.take(0, then=1)
        refused(Damaged, "does not have the SHA-256", lambda: loader.take(1, then=2))
        assert np.array_equal(loader.take(0, then=1).decode(np.arange(N)), stored_logits(0))
        shard.write_bytes(good)
        loader.take(2, then=1)
        assert np.array_equal(loader.take(1).decode(np.arange(N)), stored_logits(1))
    assert not [name for name in threads() if name.startswith("load view")]


def test_a_view_is_loaded_into_the_callers_buffers(archive: Archive):
    pool = np.zeros(1 << 16, np.uint8)
    used = 0

    def buffers(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        nonlocal used
        start, used = used, used + int(np.prod(shape)) * dtype.itemsize
        return pool[start:used].view(dtype).reshape(shape)

    packed = archive.load_view(1, "tiny", buffers=buffers)
    assert all(np.shares_memory(array, pool) for array in packed.arrays.values())
    assert np.array_equal(packed.decode(np.arange(N)), stored_logits(1))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float16_rows_are_scanned_for_values_that_are_not_finite(value: float):
    rows = np.zeros((700_000, 3), np.float16)
    rows[:, 1] = 65504.0
    rows[:, 2] = -65504.0
    assert row_out_of_range(rows) is None
    rows[654_321, 1] = value
    assert row_out_of_range(rows) == 654_321
