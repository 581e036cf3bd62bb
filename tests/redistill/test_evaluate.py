"""`evaluate`: a student's weights on held-out images, with and without its teacher."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from redistill_cache import open_archive
from redistill_cache.errors import Refused, UsageError

from redistill.evaluate import evaluate
from redistill.models import open_model, open_weights, read_weights
from redistill.models.weights import save_weights
from redistill.optim import OptimConfig
from redistill.training import TrainOptions, train
from redistill.views import archive_recipe
from tests.counted_source import CountedSource
from tests.small_archive import DATA, TEACHER, VAL, cache


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("archive") / "a.redistill.zarr", views=1, recipe="center")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's own weights, as a student."""
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    model = open_model(TEACHER)
    save_weights(model.module, path, model.metadata())
    return path


def test_images_are_read_once_for_the_index_and_once_for_their_pixels(weights: Path):
    source = CountedSource(DATA)
    result = evaluate(weights, source, size=32, workers=0)
    assert result.metrics.rows == len(source)
    assert result.metrics.teacher is None
    assert source.reads == 2 * len(source)


def test_the_teachers_own_weights_agree_with_the_archive_within_its_fidelity(weights: Path, archive: Path):
    source = CountedSource(DATA)
    result = evaluate(weights, source, archive=archive, workers=0)
    assert result.metrics.teacher is not None
    assert result.metrics.teacher.kl_t1 < 1e-5
    assert source.reads < 2.5 * len(source), "indexed once, rendered once, and the canaries"


def test_a_file_with_any_name_is_evaluated_as_the_network_that_is_named(weights: Path, tmp_path: Path):
    """Characters that separate options in a spec string."""
    odd = tmp_path / "a&b%20=c.safetensors"
    shutil.copy(weights, odd)
    assert evaluate(odd, DATA, student="demo:small", size=32, workers=0).metrics.rows == 150


def test_mismatched_inputs_are_refused(weights: Path, archive: Path, tmp_path: Path):
    with pytest.raises(Refused, match="does not exist"):
        evaluate(tmp_path / "nothing", DATA)
    with pytest.raises(UsageError, match="size"):
        evaluate(weights, DATA, size=0, workers=0)
    with pytest.raises(UsageError, match="both name weights"):
        evaluate(weights, DATA, student="demo:small?weights=other.pt")
    with pytest.raises(Refused, match="the data has 6 classes, the student 8"):
        evaluate(weights, "synthetic?n=20&classes=6", size=32, workers=0)
    with pytest.raises(Refused, match="expected the images the archive was made from"):
        evaluate(weights, "synthetic?n=150&classes=8&seed=9", archive=archive, workers=0)


@pytest.fixture(scope="module")
def trained(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at 24 px, with another normalisation than its network's own, validated on other images."""
    out = tmp_path_factory.mktemp("runs") / "run"
    options = {
        "data": DATA,
        "archive": archive,
        "students": ("demo:tiny?size=40&mean=0.2,0.4,0.6&std=0.5,0.4,0.3",),
        "out": out,
        "val": VAL,
        "size": 24,
        "batch_size": 32,
        "workers": 0,
        "log": ("csv",),
    }
    train(TrainOptions(**options, optim=OptimConfig(lr=0.05, epochs=3)))
    return out


def validated(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def test_a_run_is_evaluated_as_its_training_validated_it(trained: Path):
    result, expected = evaluate(trained, VAL, workers=0).metrics, validated(trained)
    assert (result.top1, result.nll) == (expected["top1"], pytest.approx(expected["nll"]))
    assert evaluate(trained, VAL, size=40, workers=0).metrics.nll != pytest.approx(expected["nll"])
    other = evaluate(trained / "best.safetensors", VAL, workers=0).metrics
    assert other.top1 == expected["best_top1"]


def test_the_header_of_a_student_has_what_its_training_used(trained: Path):
    header = read_weights(trained / "student.safetensors").metadata
    assert header["trained_size"] == 24
    assert (header["mean"], header["std"]) == ([0.2, 0.4, 0.6], [0.5, 0.4, 0.3])
    assert (header["num_classes"], header["interpolation"]) == (8, "bilinear")
    assert header["top1"] == validated(trained)["top1"]


def test_a_student_that_becomes_a_teacher_gets_views_of_its_training_size(trained: Path, tmp_path: Path):
    teacher = f"demo:tiny?weights={trained / 'student.safetensors'}"
    recipe = archive_recipe(open_archive(cache(tmp_path / "a.zarr", teacher=teacher, views=1)))
    assert recipe.size == 24
    assert open_model(f"{teacher}&size=40").view_size == 40, "an option has precedence"


def test_classes_are_matched_by_name_as_in_training(tmp_path: Path):
    """Validation images of some of the classes, whose numbers differ from those of the student."""
    for split, names in (("train", "abcd"), ("val", "db")):
        for number, name in enumerate(names):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for image in range(4):
                Image.new("RGB", (32, 32), (60 * "abcd".index(name), 9 * image, number)).save(folder / f"{image}.png")
    data, val, run = f"folder:{tmp_path / 'train'}", f"folder:{tmp_path / 'val'}", tmp_path / "run"
    teacher = "demo:tiny?num_classes=4&weights=random"
    path = cache(tmp_path / "a.zarr", data=data, teacher=teacher, views=1, recipe="center")
    students = ("demo:tiny",)
    options = {"archive": path, "students": students, "out": run, "val": val, "batch_size": 8, "workers": 0}
    train(TrainOptions(data=data, **options, log=("csv",), optim=OptimConfig(lr=0.01, epochs=2)))
    assert read_weights(run / "student.safetensors").metadata["class_names"] == list("abcd")
    result, expected = evaluate(run, val, workers=0).metrics, validated(run)
    assert (result.rows, result.nll) == (8, pytest.approx(expected["nll"]))


def test_a_run_of_an_earlier_version_takes_its_size_from_its_config_or_needs_the_option(trained: Path, tmp_path: Path):
    """Such a run has neither the size nor the accuracy in the header of its weights."""
    run, expected = tmp_path / "run", validated(trained)
    shutil.copytree(trained, run)
    model = open_weights(run / "student.safetensors")
    save_weights(model.module, run / "student.safetensors", replace(model, trained_size=None, top1=None).metadata())
    assert evaluate(run, VAL, workers=0).metrics.top1 == expected["top1"]
    assert open_weights(run / "student.safetensors").top1 == expected["top1"]
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("size = 24\n", ""))
    with pytest.raises(UsageError, match="earlier version that did not record the size of its views; add --size N"):
        evaluate(run, VAL, workers=0)
    assert evaluate(run, VAL, size=24, workers=0).metrics.top1 == expected["top1"]
    (run / "config.toml").write_text("size = 999999999\n")
    with pytest.raises(Refused, match="'trained_size' must be an integer from 1 to"):
        evaluate(run, VAL, size=24, workers=0)
