"""Signals added to a teacher of a finished archive: a part of their own, which readers see as that teacher's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redistill_cache import open_archive
from redistill_cache.codecs import open_codec
from redistill_cache.codecs.stats import BlockStats
from redistill_cache.errors import Damaged, Incomplete, OutOfRange, Refused
from redistill_cache.inspect import describe
from redistill_cache.spec import SignalSpec, TeacherSpec
from redistill_cache.storage import LOCAL, Files
from redistill_cache.verify import verify
from redistill_cache.writer import ArchiveWriter

from tests.attacks.forge import edit_teacher
from tests.tiny_archive import TEACHER, contents, fill, generator, make, stored_logits

ADDED = "tiny--layer3"
WIDTH = 5
CODEC = open_codec("float32", WIDTH, {"metric": "relative"}, {})
ADDITION = TeacherSpec(ADDED, (SignalSpec.of("layer3", CODEC),), {**TEACHER.model, "device": "cpu"}, adds_to="tiny")


def layer3(view: int, rows: int = 50) -> np.ndarray:
    return generator("layer3", view).normal(0, 1, (rows, WIDTH)).astype(np.float32)


def fill_added(writer: ArchiveWriter, views: int = 3) -> None:
    for block in writer.missing(f"teachers/{ADDED}"):
        if block.view < views:
            encoded = CODEC.encode(layer3(block.view)[block.start : block.stop])
            arrays = {f"layer3/{name}": np.asarray(array) for name, array in encoded.arrays.items()}
            writer.write(block, arrays, {"layer3": BlockStats.of(encoded).to_json()})


def add(path: Path, views: int = 3, files: Files = LOCAL) -> str:
    writer = ArchiveWriter.resume(path, files=files)
    writer.add_teacher(ADDITION)
    fill_added(writer, views)
    return writer.seal()


@pytest.fixture
def archive_path(tmp_path: Path) -> Path:
    make(tmp_path / "a.redistill.zarr")
    return tmp_path / "a.redistill.zarr"


def test_an_added_signal_is_one_of_the_teacher_and_nothing_else_changes(archive_path: Path) -> None:
    before, old_id = contents(archive_path), open_archive(archive_path).id
    assert add(archive_path) != old_id
    archive = open_archive(archive_path)
    assert list(archive.teachers) == ["tiny"]
    assert archive.signals_of("tiny") == archive.signals_of() == ("logits", "layer4.1", "layer3")
    assert archive.views_of("tiny") == archive.views_of("tiny", "layer3") == 3
    for view in range(3):
        assert np.array_equal(archive.features(view, layer="layer3"), layer3(view))
        assert np.array_equal(archive.logits(view), stored_logits(view))
        assert np.array_equal(archive.load_view(view, "tiny", "layer3").decode(np.array([7, 3])), layer3(view)[[7, 3]])
    with archive.loader("tiny", "layer3") as loader:
        assert np.array_equal(loader.take(0, then=1).decode(np.arange(50)), layer3(0))
        assert np.array_equal(loader.take(1).decode(np.arange(50)), layer3(1))
    teacher, signal = archive.signal("tiny", "layer3")
    assert (teacher.name, signal.width, archive.codec("tiny", "layer3").width) == ("tiny", WIDTH, WIDTH)
    after = contents(archive_path)
    changed = {name for name, data in before.items() if after[name] != data}
    assert changed == {"_redistill/manifest.json"}
    assert all(ADDED in name for name in after.keys() - before.keys())
    assert verify(archive_path, full=True).ok
    described = describe(archive)["teachers"]
    assert {name: signals.keys() for name, signals in described.items()} == {"tiny": {"logits", "layer4.1", "layer3"}}
    assert described["tiny"]["layer3"]["views"] == 3
    assert described["tiny"]["layer3"]["bytes_per_view"] > 4 * WIDTH * 0.8


def test_an_addition_with_fewer_views_is_offered_as_far_as_it_goes(archive_path: Path) -> None:
    add(archive_path, views=2)
    archive = open_archive(archive_path)
    assert (archive.num_views, archive.views_of("tiny"), archive.views_of("tiny", "layer3")) == (3, 3, 2)
    assert describe(archive)["teachers"]["tiny"]["layer3"]["views"] == 2
    with pytest.raises(OutOfRange, match=r"has views 0 to 1 of teacher tiny, layer3, requested view 2"):
        archive.features(2, layer="layer3")
    fill_added(writer := ArchiveWriter.resume(archive_path))
    writer.seal()
    assert open_archive(archive_path).views_of("tiny", "layer3") == 3


def test_an_unfinished_addition_changes_nothing_for_readers(archive_path: Path) -> None:
    identity = open_archive(archive_path).id
    ArchiveWriter.resume(archive_path).add_teacher(ADDITION)
    archive = open_archive(archive_path)
    assert archive.id == identity
    assert archive.signals_of() == ("logits", "layer4.1")
    assert verify(archive_path).ok
    with pytest.raises(OutOfRange, match=r"teacher 'tiny' of .* has no signal 'layer3'; signals: logits, layer4.1"):
        archive.signal("tiny", "layer3")


def test_a_teacher_may_have_features_alone(tmp_path: Path) -> None:
    path = tmp_path / "f.redistill.zarr"
    make(path, teachers=())
    writer = ArchiveWriter.resume(path)
    writer.add_teacher(replace(ADDITION, adds_to=None))
    fill_added(writer)
    writer.seal()
    archive = open_archive(path)
    assert archive.signals_of() == ("layer3",)
    assert describe(archive)["teacher_views"] == {ADDED: 3}
    with pytest.raises(OutOfRange, match=f"teacher '{ADDED}' of .* has no signal 'logits'; signals: layer3"):
        archive.signal(None)


def test_removing_the_teacher_removes_what_was_added_to_it(archive_path: Path) -> None:
    alone = ArchiveWriter.resume(archive_path).teacher_bytes("tiny")
    add(archive_path)
    writer = ArchiveWriter.resume(archive_path)
    assert writer.additions("tiny") == [ADDED]
    assert writer.teacher_bytes("tiny") > alone
    writer.remove_teacher("tiny")
    assert not any("tiny" in name for name in contents(archive_path))
    assert not open_archive(archive_path).teachers
    assert verify(archive_path).ok


class Stopped(Exception):
    """A crash."""


class StoppingFiles(Files):
    """Local files until one more than this many files of the archive is removed."""

    def __init__(self, removals: int) -> None:
        super().__init__()
        self.removals = removals

    def remove(self, path: Path) -> None:
        self.removals -= path.suffix != ".partial"
        if self.removals < 0:
            raise Stopped
        super().remove(path)


def test_a_removal_that_was_interrupted_anywhere_is_finished_by_the_same_call(archive_path: Path) -> None:
    add(archive_path)
    for removals in range(0, 200, 7):
        copy = archive_path.parent / f"copy{removals}.redistill.zarr"
        shutil.copytree(archive_path, copy)
        try:
            ArchiveWriter.resume(copy, files=StoppingFiles(removals)).remove_teacher("tiny")
            break
        except Stopped:
            assert not open_archive(copy).teachers
            ArchiveWriter.resume(copy).remove_teacher("tiny")
        assert not any("tiny" in name for name in contents(copy))
        shutil.rmtree(copy)
    else:
        pytest.fail("the removal never ended")
    assert removals > 10


def test_removing_what_was_added_leaves_the_teacher_as_it_was(archive_path: Path) -> None:
    before = contents(archive_path)
    add(archive_path)
    ArchiveWriter.resume(archive_path).remove_teacher(ADDED)
    assert contents(archive_path) == before


@pytest.mark.parametrize(
    ("addition", "reason"),
    [
        (replace(ADDITION, adds_to="other"), "is no teacher of this archive"),
        (replace(ADDITION, model={"name": "demo:tiny", "weights": "1" * 64}), "are of another network than teacher"),
    ],
)
def test_a_writer_refuses_signals_of_another_network(archive_path: Path, addition: TeacherSpec, reason: str) -> None:
    writer = ArchiveWriter.resume(archive_path)
    with pytest.raises(Refused, match=reason):
        writer.add_teacher(addition)


@pytest.mark.parametrize("change", [{"adds_to": "nobody"}, {"model": {"name": "demo:tiny", "weights": "1" * 64}}])
def test_a_reader_refuses_signals_of_another_network(archive_path: Path, change: dict[str, object]) -> None:
    add(archive_path)
    edit_teacher(archive_path, lambda value: value.update(change), ADDED)
    with pytest.raises(Damaged, match=r"is no teacher of this archive|are of another network"):
        open_archive(archive_path)


def test_only_a_part_with_added_signals_has_the_new_version(archive_path: Path) -> None:
    add(archive_path)
    versions = {
        name: json.loads((archive_path / "teachers" / name / "zarr.json").read_bytes())["attributes"][
            "redistill_teacher"
        ]["version"]
        for name in ("tiny", ADDED)
    }
    assert versions == {"tiny": "1.0", ADDED: "1.1"}


def test_an_unsealed_archive_offers_the_committed_blocks_of_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "u.redistill.zarr"
    make(path)
    writer = ArchiveWriter.resume(path)
    writer.add_teacher(ADDITION)
    fill_added(writer, views=1)
    (path / "_redistill/manifest.json").unlink()
    archive = open_archive(path, allow_partial=True)
    assert archive.signals_of() == ("logits", "layer4.1", "layer3")
    assert np.array_equal(archive.features(0, layer="layer3"), layer3(0))
    with pytest.raises(Incomplete):
        archive.features(1, layer="layer3")
    fill(writer, ["views"])
