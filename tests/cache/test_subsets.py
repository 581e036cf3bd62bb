"""Subsets of views and rows: every stored value is the parent's, in the library and in tensorstore."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from redistill_cache import Archive, fetch_archive, layout, open_archive
from redistill_cache.codecs import BlockStats
from redistill_cache.errors import Incomplete, OutOfRange, Refused, SpecMismatch, UsageError
from redistill_cache.inspect import describe
from redistill_cache.packing import pack
from redistill_cache.rows import read_rows
from redistill_cache.spec import ArraySpec, Parent
from redistill_cache.subsets import choose_rows, choose_views, plan_subset, write_subset
from redistill_cache.verify import verify
from redistill_cache.writer import ArchiveWriter

from tests import tiny_archive
from tests.attacks.forge import edit
from tests.cache.test_archive_additions import add
from tests.conftest import folder_in_memory
from tests.faults import scenario
from tests.tiny_archive import contents, fill, make

# Half of the rows are canaries of each view, and 28 rows make four blocks, the last one short.
SPEC = replace(tiny_archive.SPEC, num_samples=28, block_rows=8, canaries_per_view=14)
N, VIEWS = SPEC.num_samples, SPEC.num_views


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    """Two teachers, of which the second has two views; signals added to the first one, with one view."""
    with folder_in_memory(tmp_path_factory.mktemp("parent")) as folder:
        path = folder / "p.redistill.zarr"
        make(path, SPEC, ("tiny",))
        writer = ArchiveWriter.resume(path)
        writer.add_teacher(replace(tiny_archive.TEACHER, name="other"))
        for block in writer.missing("teachers/other"):
            if block.view < 2:
                writer.write(block, *tiny_archive.block_data(block, SPEC))
        add(path, views=1)
        yield open_archive(path)


@pytest.fixture
def tmp_path(ram: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(ram / "cache"))
    return ram


def take(parent: Archive, out: Path, views: Sequence[int], rows: Sequence[int] | None = None) -> Archive:
    write_subset(plan_subset(parent, out, tuple(views), None if rows is None else np.array(rows)))
    assert verify(out, full=True).ok
    return open_archive(out, verify="full")


def stored(archive: Archive, part: str, name: str, view: int, rows: np.ndarray) -> np.ndarray:
    """Rows of an array as they are stored."""
    array = layout.part_arrays(archive.spec, archive.state.teachers, part)[name]
    values = np.empty((len(rows), *array.row_shape), array.dtype)
    read_rows(archive.state, part, array, view, rows, values)
    return values


def assert_same_rows(subset: Archive, parent: Archive, views: Sequence[int], rows: Sequence[int]) -> None:
    """Every stored integer, view parameter, sample and canary is that of the parent."""
    rows, here = np.array(rows), np.arange(len(rows))
    assert subset.spec.subset_of == Parent(parent.id or "", tuple(views))
    assert (subset.num_samples, subset.num_views) == (len(rows), len(views))
    assert list(subset.keys) == [parent.keys[row] for row in rows]
    for name in ("labels", "digests", "sizes"):
        assert np.array_equal(getattr(subset, name), getattr(parent, name)[rows])
    for part in layout.parts(subset.spec, subset.state.teachers):
        if part == "canaries":
            continue
        name = part.removeprefix("teachers/")
        count = subset.state.views_of(name) if part != "views" else len(views)
        for array in layout.part_arrays(subset.spec, subset.state.teachers, part):
            for view in range(count):
                expected = stored(parent, part, array, views[view], rows)
                assert stored(subset, part, array, view, here).tobytes() == expected.tobytes()
    for view, old in enumerate(views if subset.spec.canaries_per_view else ()):
        of_parent = dict(zip(*parent.canaries(old), strict=True))
        for row, pixels in zip(*subset.canaries(view), strict=True):
            assert np.array_equal(of_parent[rows[row]], pixels)


# -- values -----------------------------------------------------------------------------------------------------------


def some(count: int) -> st.SearchStrategy[list[int]]:
    """Some of so many numbers, rising."""
    return st.sets(st.integers(0, count - 1), min_size=1).map(sorted)


def check_subset(parent: Archive, views: list[int], rows: list[int]) -> None:
    with folder_in_memory(parent.path.parent) as folder:
        subset = take(parent, folder / "s", views, rows)
        assert_same_rows(subset, parent, views, rows)
        assert set(subset.teachers) == {"tiny", *(["other"] if min(views) < 2 else [])}
        assert ("layer3" in subset.signals_of("tiny")) == (views[0] == 0)
        kept = [len(np.intersect1d(parent.canaries(view)[0], rows)) for view in views]
        assert subset.spec.canaries_per_view == min(kept)
        shutil.rmtree(subset.path)


@settings(max_examples=3, deadline=None)
@given(views=some(VIEWS), rows=some(N))
def test_every_value_of_any_subset_is_the_parents(parent: Archive, views: list[int], rows: list[int]):
    check_subset(parent, views, rows)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(views=some(VIEWS), rows=some(N))
def test_every_value_of_three_hundred_subsets_is_the_parents(parent: Archive, views: list[int], rows: list[int]):
    check_subset(parent, views, rows)


def test_views_are_whole_files_with_their_statistics(parent: Archive, tmp_path: Path):
    subset = take(parent, tmp_path / "s", (0, 2))
    assert_same_rows(subset, parent, (0, 2), range(N))
    assert subset.spec.canaries_per_view == SPEC.canaries_per_view
    for new, old in ((0, 0), (1, 2)):
        for name in ("views/crop/c.{}.1.0", "teachers/tiny/logits/values/c.{}.3.0", "canaries/row/c.{}.0"):
            assert (subset.path / name.format(new)).read_bytes() == (parent.path / name.format(old)).read_bytes()
    assert BlockStats.from_json(subset.state.stats["tiny"]["logits"]).rows == 2 * N


def test_the_first_views_are_those_of_an_archive_with_fewer_views(tmp_path: Path):
    fewer = tmp_path / "fewer"
    make(fewer, replace(SPEC, num_views=2))
    make(tmp_path / "p", SPEC)
    take(open_archive(tmp_path / "p"), tmp_path / "s", (0, 1))
    expected, found = contents(fewer), contents(tmp_path / "s")
    assert expected.keys() == found.keys()
    differing = {name for name in expected if expected[name] != found[name]}
    assert all(name in ("zarr.json", "_redistill/manifest.json") or "/blocks/" in name for name in differing)


def test_tensorstore_reads_the_same_integers_and_the_certificate_is_kept(tmp_path: Path):
    """The linear codec: an outlier, rows that are stored exactly, side data."""

    def read(path: Path) -> np.ndarray:
        kvstore = {"driver": "file", "path": str(path)}
        return np.asarray(tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result().read().result())

    scenario.write_archive(tmp_path / "p")
    parent, rows = open_archive(tmp_path / "p"), [3, 4, 5, 16, 20]
    subset = take(parent, tmp_path / "s", (1,), rows)
    for folder in ("teachers/net/logits", "views"):
        for name in [path.name for path in (parent.path / folder).iterdir() if path.is_dir() and path.name != "side"]:
            found, expected = (read(a.path / folder / name) for a in (subset, parent))
            assert found.tobytes() == np.ascontiguousarray(expected[1:2, rows]).tobytes()
    for side in (parent.path / "teachers/net/logits/side").rglob("c.*"):
        assert (subset.path / side.relative_to(parent.path)).read_bytes() == side.read_bytes()
    assert np.array_equal(subset.logits(0), parent.logits(1, rows))
    assert np.array_equal(subset.load_view(0).decode(np.arange(5)), parent.logits(1, rows))
    # The bound of every row stays; the errors of some rows of a block are not known.
    fidelity, of_parent = (describe(a)["teachers"]["net"]["logits"]["fidelity"] for a in (subset, parent))
    assert fidelity == {"bound": of_parent["bound"], "metric": "kl"}
    assert subset.state.stats == {"net": {}}


# -- the specification ------------------------------------------------------------------------------------------------


def test_only_a_subset_has_the_new_version(parent: Archive, tmp_path: Path):
    """Readers of version 1.0 ignore what they do not know of a newer one, and refuse to add to it."""
    take(parent, tmp_path / "s", (0, 1), [1, 5, 20])
    roots = [
        json.loads((path / "zarr.json").read_bytes())["attributes"]["redistill"]
        for path in (tmp_path / "s", parent.path)
    ]
    assert [root["version"] for root in roots] == ["1.1", "1.0"]
    assert roots[0].keys() - roots[1].keys() == {"subset_of"}


def test_no_views_are_added_to_a_subset(parent: Archive, tmp_path: Path):
    take(parent, tmp_path / "s", (0, 1))
    with pytest.raises(Refused, match=f"is a subset of archive {parent.id}; add views to that one"):
        ArchiveWriter.extend_views(tmp_path / "s", 3)


@pytest.mark.parametrize(
    "parent_of",
    [{"id": "0" * 63, "views": [0, 1]}, {"id": "0" * 64, "views": [0]}, {"id": "0" * 64, "views": [1, 0]}, {}, "x"],
)
def test_a_reader_refuses_a_parent_that_no_writer_states(parent: Archive, tmp_path: Path, parent_of: object):
    take(parent, tmp_path / "s", (0, 1))
    edit(tmp_path / "s", lambda root: root.update(subset_of=parent_of))
    with pytest.raises(Refused, match="subset_of"):
        open_archive(tmp_path / "s")


def test_a_subset_of_a_subset_names_it(parent: Archive, tmp_path: Path):
    first = take(parent, tmp_path / "s", (0, 2), [0, 1, 8, 9, 27])
    second = take(first, tmp_path / "t", (1,), [1, 4])
    assert second.spec.subset_of == Parent(first.id or "", (1,))
    assert np.array_equal(second.logits(0), parent.logits(2, [1, 27], teacher="tiny"))


def test_a_copy_with_some_views_has_subsets_of_these(parent: Archive, tmp_path: Path):
    pack(parent.path, tmp_path / "packed")
    copy = open_archive(fetch_archive(str(tmp_path / "packed"), tmp_path / "copy", views=1))
    subset = take(copy, tmp_path / "s", (0,), [2, 3])
    assert subset.spec.subset_of == Parent(parent.id or "", (0,))
    assert_same_rows(subset, parent, (0,), [2, 3])


def test_the_licence_is_that_of_the_parent_as_it_was_edited(tmp_path: Path):
    make(tmp_path / "p", SPEC)
    ArchiveWriter.resume(tmp_path / "p").edit_terms(licence="CC0-1.0")
    assert take(open_archive(tmp_path / "p"), tmp_path / "s", (0,)).spec.licence == "CC0-1.0"


# -- choosing ---------------------------------------------------------------------------------------------------------


def test_views_are_chosen_by_number_list_or_span():
    assert choose_views("2", 3) == (0, 1)
    assert choose_views("0,2", 3) == (0, 2)
    assert choose_views("2:3", 3) == (2,)
    assert choose_views(":", 3) == (0, 1, 2)
    for text, kind in {"4": OutOfRange, "0,3": OutOfRange, "1:4": OutOfRange, "2:2": OutOfRange}.items():
        with pytest.raises(kind, match=text):
            choose_views(text, 3)
    for text in ("0", "", "2,1", "1,1", "x", "-1", "0,,2"):
        with pytest.raises(UsageError, match="--views"):
            choose_views(text, 3)


def test_rows_are_chosen_by_span_file_and_class(parent: Archive, tmp_path: Path):
    def listed(*lines: str) -> str:
        (tmp_path / "rows.txt").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "rows.txt")

    labels = parent.labels
    assert choose_rows(parent, "3:7").tolist() == [3, 4, 5, 6]
    assert choose_rows(parent, listed("9", "", "2")).tolist() == [2, 9]
    assert choose_rows(parent, listed(parent.keys[9], parent.keys[0])).tolist() == [0, 9]
    assert choose_rows(parent, classes=["bee", "0"]).tolist() == np.flatnonzero(labels <= 1).tolist()
    assert choose_rows(parent, "5:", ["bee"]).tolist() == np.flatnonzero((labels == 1) & (np.arange(N) >= 5)).tolist()
    for lines, kind, message in (
        (("9", "28"), OutOfRange, "has no sample '28'"),
        ((parent.keys[1], "nothing.png"), OutOfRange, "has no sample 'nothing.png'"),
        (("9", "9"), UsageError, "found row 9 again"),
        (("",), UsageError, "found none"),
    ):
        file = listed(*lines)
        with pytest.raises(kind, match=message):
            choose_rows(parent, file)
    with pytest.raises(Refused, match="No such file"):
        choose_rows(parent, str(tmp_path / "none.txt"))
    with pytest.raises(OutOfRange, match="has no class 'wolf'"):
        choose_rows(parent, classes=["wolf"])
    with pytest.raises(OutOfRange, match="no row is left"):
        choose_rows(parent, f"{np.flatnonzero(labels == 1)[-1] + 1}:", ["bee"])


def test_so_many_rows_of_each_class_with_canaries_first(parent: Archive):
    canaries = parent.canaries(1)[0]
    for count in (1, 3, 100):
        rows = choose_rows(parent, per_class=count, views=[1])
        for label in range(SPEC.num_classes):
            of_class = np.flatnonzero(parent.labels == label)
            kept = rows[parent.labels[rows] == label]
            assert len(kept) == min(count, len(of_class))
            among = np.intersect1d(of_class, canaries)
            assert len(np.intersect1d(kept, among)) == min(count, len(among))


def test_rows_without_a_label_are_of_no_class(tmp_path: Path):
    writer = ArchiveWriter.create(tmp_path / "p", SPEC)
    samples = tiny_archive.samples(SPEC)
    writer.write_samples(**samples | {"labels": np.where(np.arange(N) < 20, -1, samples["labels"])})
    writer.add_teacher(tiny_archive.TEACHER)
    fill(writer)
    writer.seal()
    archive = open_archive(tmp_path / "p")
    assert choose_rows(archive, per_class=N).tolist() == list(range(20, N))
    with pytest.raises(OutOfRange, match="--per-class needs labels"):
        choose_rows(archive, ":20", per_class=1)


# -- refusals, and continuing -----------------------------------------------------------------------------------------


def test_what_cannot_be_a_subset_is_refused_before_anything_is_written(parent: Archive, tmp_path: Path):
    mixed = replace(SPEC, view_arrays=(ArraySpec("mix_partner", "uint32"),), num_views=1, canaries_per_view=0)
    writer = ArchiveWriter.create(tmp_path / "mixed", mixed)
    writer.write_samples(**tiny_archive.samples(mixed))
    writer.add_teacher(tiny_archive.TEACHER)
    with pytest.raises(Incomplete, match="not finished, so it has no id"):
        plan_subset(open_archive(tmp_path / "mixed", allow_partial=True), tmp_path / "s", (0,))
    fill(writer, ["teachers/tiny"])
    for block in writer.missing("views"):
        writer.write(block, {"mix_partner": np.zeros(len(block.rows), np.uint32)})
    writer.seal()
    archive = open_archive(tmp_path / "mixed")
    with pytest.raises(Refused, match="mix every row with another one"):
        plan_subset(archive, tmp_path / "s", (0,), np.arange(3))
    assert take(archive, tmp_path / "views", (0,), range(N)).num_samples == N
    with pytest.raises(SpecMismatch, match="num_views = 3, now it is 1"):
        write_subset(plan_subset(parent, parent.path, (0,)))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").touch()
    with pytest.raises(Refused, match="exists already"):
        write_subset(plan_subset(parent, tmp_path / "s", (0,)))
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_refused_before_anything_is_written(
    parent: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan, free = plan_subset(parent, tmp_path / "s", (0,)), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=plan.estimated_bytes - 1))
    with pytest.raises(Refused, match=f"needs {plan.estimated_bytes} bytes"):
        write_subset(plan)
    assert not (tmp_path / "s").exists()


def test_another_subset_is_not_continued(parent: Archive, tmp_path: Path):
    take(parent, tmp_path / "s", (0, 1), [1, 2, 3])
    before = contents(tmp_path / "s")
    take(parent, tmp_path / "s", (0, 1), [1, 2, 3])
    for views, rows, message in (
        ((0, 2), [1, 2, 3], r"subset_of\.views\[1\] = 1, now it is 2"),
        ((0, 1), [1, 2], "num_samples = 3, now it is 2"),
        ((0, 1), [1, 2, 4], "the sample index was written before and differs"),
    ):
        with pytest.raises(SpecMismatch, match=message):
            take(parent, tmp_path / "s", views, rows)
    assert contents(tmp_path / "s") == before
