"""Copies that hold some teachers of an archive only: what is fetched, what they offer, and how they get the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import ArchiveWriter, fetch_archive, layout, open_archive, packed, stream_archive
from redistill_cache.addresses import parse_address
from redistill_cache.combining import plan_merge, skeleton
from redistill_cache.copies import Held
from redistill_cache.errors import Damaged, Incomplete, OutOfRange, Refused, UsageError
from redistill_cache.inspect import describe
from redistill_cache.packing import pack
from redistill_cache.sending import copy_archive, send
from redistill_cache.storage import LOCAL
from redistill_cache.verify import quarantine, verify

from tests import tiny_archive
from tests.flaky_server import Flaky, serving
from tests.tiny_archive import SPEC, TEACHER, contents, stored_logits

VIEWS = 3
ADDED = "b--more"  # signals that were added to b


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three views of teacher a; two of b, with a signal that was added to it; three of d."""
    path = tmp_path_factory.mktemp("whole") / "w.redistill.zarr"
    spec = replace(SPEC, block_rows=64)
    writer = tiny_archive.start(path, spec, ("a", "b", "d"))
    signal = replace(TEACHER.signals[1], name="more")
    writer.add_teacher(replace(TEACHER, name=ADDED, signals=(signal,), adds_to="b"))
    for part in writer.parts():
        for block in writer.missing(part):
            if block.view >= 2 and part.startswith("teachers/b"):
                continue
            arrays, stats = tiny_archive.block_data(block, spec)
            if part == f"teachers/{ADDED}":
                arrays = {name.replace("layer4.1", "more"): a for name, a in arrays.items() if "layer4.1" in name}
                stats = {"more": (stats or {})["layer4.1"]}
            writer.write(block, arrays, stats)
    writer.seal(complete=True)
    return path


@contextmanager
def served(archive: Path) -> Iterator[tuple[str, Flaky]]:
    files = {f"x/{path.relative_to(archive)}": path.read_bytes() for path in archive.rglob("*") if path.is_file()}
    with serving(Flaky(files)) as flaky:
        yield f"{flaky.address}/x", flaky


def teachers_here(copy: Path) -> dict[str, set[int]]:
    """The teachers and views whose rows are on the disk."""
    here: dict[str, set[int]] = {}
    for name in contents(copy):
        teacher, view = layout.teacher_of_file(name), layout.view_of_file(name)
        if teacher is not None and view is not None:
            here.setdefault(teacher, set()).add(view)
    return here


@pytest.mark.parametrize("form", ["tree", "packed"])
def test_teachers_are_fetched_by_and_by(form: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed, "SMALL_GAP", 0)  # the files are small
    source = whole
    if form == "packed":
        source = tmp_path / "w.redistill"
        pack(whole, source)
    out, entries = tmp_path / "out", open_archive(whole).state.files
    steps: list[tuple[int, int]] = []
    with served(source) as (address, flaky):
        fetch_archive(address, out, views=1, teachers=["b"], progress=lambda *step: steps.append(step))
        assert teachers_here(out) == {"b": {0}, ADDED: {0}}
        held = {name for name in contents(out) if name in entries}
        size = sum(entries[name].size for name in held)
        assert steps[-1] == (size, size)
        if form == "tree":
            assert {layout.teacher_of_file(request.path[3:]) for request in flaky.requests} == {None, "b", ADDED}
        else:
            tar = len(flaky.files["x/view-0000.tar"])
            sent = sum(request.sent for request in flaky.requests if request.path.endswith("view-0000.tar"))
            of_b = sum(entries[name].size for name in held if layout.view_of_file(name) == 0)
            assert of_b < sent < tar / 2, "ranges: what is wanted, and headers"

        copy = open_archive(out, verify="full")
        assert (copy.id, list(copy.teachers), copy.num_views, copy.complete) == (
            open_archive(whole).id,
            ["b"],
            1,
            False,
        )
        assert copy.signals_of() == ("logits", "layer4.1", "more")
        assert np.array_equal(copy.logits(0), stored_logits(0, teacher="b"))
        assert np.array_equal(
            copy.features(0, layer="more"), open_archive(whole).features(0, layer="more", teacher="b")
        )
        for read in (lambda: copy.logits(0, teacher="a"), lambda: copy.load_view(0, "d")):
            with pytest.raises(OutOfRange, match=r"copy without teacher '[ad]'.*fetch ADDRESS .*/out --teachers [ad]$"):
                read()
        report = verify(out, full=True)
        assert (report.ok, report.views, report.sealed_views) == (True, 1, VIEWS)
        assert report.lacking == describe(copy)["lacking"] == {"a": 0, "d": 0}
        assert list(describe(copy)["teachers"]) == ["b"]

        fetch_archive(address, out, views=2, teachers=["a"])
        copy = open_archive(out, verify="full")
        assert (list(copy.teachers), copy.num_views, copy.views_of("a"), copy.views_of("b")) == (["a", "b"], 2, 2, 1)
        assert np.array_equal(copy.logits(1, teacher="a"), stored_logits(1, teacher="a"))
        with pytest.raises(OutOfRange, match="has views 0 to 0 of teacher b, requested view 1"):
            copy.logits(1, teacher="b")
        assert teachers_here(out) == {"a": {0, 1}, "b": {0}, ADDED: {0}}
        assert (verify(out, full=True).ok, verify(out).lacking) == (True, {"b": 1, "d": 0})

        fetch_archive(address, out, teachers=["b", "a"])
        assert (verify(out).views, verify(out).lacking) == (VIEWS, {"d": 0}), "b has two views, and both are here"
        before = len(flaky.requests)
        fetch_archive(address, out)
        asked = {layout.teacher_of_file(request.path[3:]) for request in flaky.requests[before:]}
        assert asked == ({None, "d"} if form == "tree" else {None})
    assert contents(out) == contents(whole)
    assert open_archive(out).complete


def test_what_is_not_there_is_refused_before_anything_is_fetched(whole: Path, tmp_path: Path):
    with served(whole) as (address, flaky):
        for wrong, problem in (
            (["b", "vit"], r"/x has no teacher 'vit'; teachers: a, b, d$"),
            ([ADDED], "no teacher 'b--"),
        ):
            with pytest.raises(OutOfRange, match=problem):
                fetch_archive(address, tmp_path / "out", teachers=wrong)
        for wrong in ([], ["a", "a"]):
            with pytest.raises(UsageError, match="expected the names of teachers, each once, found"):
                fetch_archive(address, tmp_path / "out", teachers=wrong)
        assert not (tmp_path / "out").exists()
        assert {layout.view_of_file(request.path[3:]) for request in flaky.requests} == {None}
        fetch_archive(address)
        for arguments in ({"teachers": ["vit"]}, {"views": 4}):  # of a copy that is whole as well
            with pytest.raises(OutOfRange, match=r"has no teacher 'vit'|has 3 views, 4 are asked for"):
                fetch_archive(address, **arguments)


def test_room_is_needed_for_what_is_fetched_only(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = open_archive(whole).state.files
    needed = sum(files[name].size for name in Held(2, {"a": 0, "d": 0}).files(files))
    usage = shutil.disk_usage(whole)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    fetch_archive(str(whole), tmp_path / "out", teachers=["b"])
    with pytest.raises(Refused, match=rf"needs \d+ bytes, {needed} are free"):
        fetch_archive(str(whole), tmp_path / "other", teachers=["b", "d"])


def test_a_copy_of_some_teachers_is_never_taken_for_the_whole(whole: Path, tmp_path: Path):
    out = fetch_archive(str(whole), tmp_path / "out", teachers=["a"])
    assert (verify(out).views, verify(out).lacking) == (VIEWS, {"b": 0, "d": 0})
    before = contents(out)
    changes: list[Callable[[], object]] = [
        lambda: ArchiveWriter.resume(out),
        lambda: ArchiveWriter.extend_views(out, 5),
        lambda: pack(out, tmp_path / "p"),
        lambda: copy_archive(str(out), str(tmp_path / "p"), pack=True),
        lambda: send(out, parse_address("s3://lab/p"), pack=True),
        lambda: plan_merge([whole, out], tmp_path / "m"),
        lambda: quarantine(out, ()),
    ]
    for change in changes:
        with pytest.raises(Refused, match=r"holds a part of its archive only.*without --views and --teachers"):
            change()
    assert contents(out) == before
    skeleton(out, tmp_path / "s1")  # needs no rows, and every copy has the rest
    skeleton(whole, tmp_path / "s2")
    assert contents(tmp_path / "s1") == contents(tmp_path / "s2")
    (out / "teachers/d/extra").write_bytes(b"x")
    assert [item.path for item in verify(out).damaged] == ["teachers/d/extra"]
    (out / "teachers/d/extra").unlink()
    open_archive(out)  # the sizes of what is here are known now, and of nothing else
    (out / "_redistill/copy.json").unlink()
    with pytest.raises(Damaged, match=r"teachers\.[bd].*is missing"):
        open_archive(out)


def test_a_note_is_believed_only_where_it_is_possible(whole: Path, tmp_path: Path):
    out = fetch_archive(str(whole), tmp_path / "out", views=2)
    note, identity = out / "_redistill/copy.json", str(open_archive(whole).id)
    assert note.read_text() == f'{{"id":"{identity}","views":2}}', "as earlier versions write and read it"
    for fewer in ('{"a":1,"b":0}', f'{{"a":1,"d":0,"{ADDED}":0}}'):
        note.write_text(f'{{"id":"{identity}","teacher_views":{fewer},"views":2}}')
        assert verify(out, full=True).ok
        assert open_archive(out).views_of("a") == 1
    note.write_text(f'{{"id":"{identity}","teacher_views":{{"a":0,"b":0,"d":0}},"views":2}}')
    with pytest.raises(Incomplete, match="does not hold the first view"):
        open_archive(out)
    for flaw in (
        '{"a":2}',
        '{"b":-1}',
        '{"a":true}',
        '{"e":0}',
        "{}",
        "[]",
        '{"a":"0"}',
        '{"a":0},"more":1',
        '{"a":0.0}',
    ):
        note.write_text(f'{{"id":"{identity}","teacher_views":{flaw},"views":2}}')
        with pytest.raises(Refused, match=r"copy\.json: ") as refused:
            open_archive(out)
        assert "\n" not in str(refused.value)


def test_damage_of_a_copy_is_found_and_repaired(whole: Path, tmp_path: Path):
    out = fetch_archive(str(whole), tmp_path / "out", teachers=["b"], views=1)
    expected = contents(out)
    shard = next((out / "teachers/b/logits/values").glob("c.0.*"))
    shard.write_bytes(bytes(len(expected[str(shard.relative_to(out))])))
    assert [item.path for item in verify(out, full=True).damaged] == [str(shard.relative_to(out))]
    fetch_archive(str(whole), out, teachers=["a"], views=1)
    assert verify(out, full=True).ok
    LOCAL.remove(shard)
    fetch_archive(str(whole), out, teachers=["b"])
    assert open_archive(out, verify="full").views_of("b") == 2
    assert expected.items() - contents(out).items() == {("_redistill/copy.json", expected["_redistill/copy.json"])}


def test_the_copy_in_the_cache_may_be_of_some_teachers(whole: Path):
    with served(whole) as (address, flaky):
        copy = fetch_archive(address, teachers=["b"])
        assert list(open_archive(copy).teachers) == ["b"]
        before = len(flaky.requests)
        archive = stream_archive(address)
        archive.arrivals.only(["b"])
        assert np.array_equal(archive.logits(1, teacher="b"), stored_logits(1, teacher="b"))
        assert {layout.view_of_file(request.path[3:]) for request in flaky.requests[before:]} == {None}
        assert np.array_equal(archive.logits(2, teacher="d"), stored_logits(2, teacher="d"))
        archive.arrivals.close()
        assert 0 not in teachers_here(copy)["d"]
        assert open_archive(address).complete
        assert contents(copy) == contents(whole)
