"""A run remembers which teachers and views it reads, and resumes with them on an archive that has gained some."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import redistill_cache
from redistill_cache.errors import Refused, SpecMismatch

from redistill.interrupts import Interrupted
from redistill.progress import NoProgress
from redistill.training import TrainOptions, train
from tests.redistill.training.runs import InterruptAt, history, weights
from tests.small_archive import DATA, cache

OTHER = {"teacher": "demo:tiny?num_classes=8&weights=random", "teacher_name": "other"}
EPOCHS = 4


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("archive") / "a.redistill.zarr", views=2)


def options(archive: Path, out: Path, **changed) -> TrainOptions:
    base = {"data": DATA, "archive": archive, "students": ("demo:tiny?num_classes=8",), "out": out, "workers": 0}
    flat = base | {"batch_size": 50, "epochs": EPOCHS, "log": ("csv",), "checkpoint_minutes": 0.0, "device": "cpu"}
    return TrainOptions.read(flat | changed)


class Infos(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, message: str) -> None:
        self.lines.append(message)


def test_a_run_resumes_on_an_archive_that_gained_views_and_a_teacher(archive: Path, tmp_path: Path):
    train(options(archive, tmp_path / "straight"))
    grown = tmp_path / "grown.redistill.zarr"
    shutil.copytree(archive, grown)
    out = tmp_path / "resumed"
    with pytest.raises(Interrupted):
        train(options(grown, out), InterruptAt(4))
    cache(grown, views=3, extend_views=True)
    cache(grown, views=1, **OTHER)
    infos = Infos()
    train(options(grown, out), infos)
    assert weights(out) == weights(tmp_path / "straight")
    assert history(out) == history(tmp_path / "straight")
    assert any("first 2 of the archive's 3 views" in line for line in infos.lines)
    assert any("resuming" in line for line in infos.lines)
    # The teacher may be named now, but not be another one.
    train(options(grown, out, teachers=("small",)))
    with pytest.raises(SpecMismatch, match="started with the teachers small"):
        train(options(grown, out, teachers=("other",)))


def test_a_run_does_not_resume_on_other_logits(archive: Path, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(options(archive, out), InterruptAt(4))
    for name, changed in (("seed", {"seed": 6}), ("views", {"views": 1}), ("teacher", {"teacher": OTHER["teacher"]})):
        other = cache(tmp_path / f"{name}.redistill.zarr", **({"views": 2} | changed))
        with pytest.raises(Refused, match="does not hold the same views and teachers") as error:
            train(options(other, out))
        assert "\n" not in str(error.value)


def test_several_teachers_must_be_named(archive: Path, tmp_path: Path):
    path = tmp_path / "a.redistill.zarr"
    shutil.copytree(archive, path)
    cache(path, views=1, **OTHER)
    with pytest.raises(Refused, match=r"teachers other, small; .*--teacher-names other,small for the mean"):
        train(options(path, tmp_path / "none"))
    infos = Infos()
    train(options(path, tmp_path / "both", teachers=("small", "other"), epochs=2), infos)
    assert [row["view"] for row in history(tmp_path / "both")] == ["0", "0"], "the teachers share one view"
    assert any("first 1 of the archive's 2 views" in line for line in infos.lines)
    train(options(path, tmp_path / "one", teachers=("small",), epochs=2))
    assert [row["view"] for row in history(tmp_path / "one")] == ["0", "1"]
    train(options(path, tmp_path / "ce", losses=("ce",), epochs=1))


def test_a_teacher_offers_the_views_it_has(archive: Path, tmp_path: Path):
    import redistill

    path = tmp_path / "a.redistill.zarr"
    shutil.copytree(archive, path)
    cache(path, views=1, **OTHER)
    teacher = redistill.CachedTeacher(redistill_cache.open_archive(path), teacher="other")
    assert teacher([0, 1], 0).shape == (2, 8)
    with pytest.raises(redistill_cache.errors.OutOfRange, match=r"\[0, 1\)"):
        teacher([0, 1], 1)
