"""The archive holds the teacher's logits for the views that students train on, for any data and teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redistill_cache
import torch
from PIL import Image
from redistill_cache.codecs import kl_rows
from redistill_cache.errors import Refused
from redistill_cache.inspect import describe
from redistill_cache.verify import verify

import redistill
from redistill.caching import cache_teacher, estimate_cache
from redistill.caching.run import MIN_LABELLED
from redistill.demo.run import DIFFICULTY, TEACHER_NETWORK
from redistill.models import open_model, save_weights
from redistill.models.demo import NORM
from redistill.progress import NoProgress
from redistill.sources.base import Sample
from redistill.teachers import Teacher
from redistill.views import ViewDataset
from redistill.views.canaries import check_canaries
from tests import odd_teachers
from tests.stage1 import (
    DATA,
    FIVE_CLASSES,
    OTHER_TEACHER,
    TEACHER,
    cache_options,
    five_class_options,
    odd_teacher,
    read_note,
)

CPU = torch.device("cpu")


def render_view(source: object, archive: redistill_cache.Archive, view: int = 0) -> torch.Tensor:
    """Every row of a view, rendered from the archive alone."""
    return torch.stack([redistill.render(source, archive, row, view) for row in range(archive.num_samples)])


def online_logits(pixels: torch.Tensor, spec: str = TEACHER, **options) -> np.ndarray:
    return Teacher(open_model(spec, allow_python=True), device=CPU, **options)(pixels)["logits"].numpy()


def largest_kl(exact: np.ndarray, stored: np.ndarray) -> float:
    return max(float(kl_rows(exact, stored, t).max()) for t in (1.0, 4.0))


def test_stored_logits_equal_online_logits(tmp_path: Path):
    """For every row of every view, rendered from the archive."""
    cache_teacher(five_class_options(tmp_path / "a.zarr"))
    archive = redistill_cache.open_archive(tmp_path / "a.zarr", verify="full")
    source = redistill.open_source(FIVE_CLASSES["data"])
    for view in range(2):
        exact = online_logits(render_view(source, archive, view), FIVE_CLASSES["teacher"])
        stored = archive.logits(view)
        assert largest_kl(exact, stored) <= 1e-3
        assert stored.std(0).max() > 0, "constant logits would prove nothing"
    assert verify(tmp_path / "a.zarr", full=True).ok
    assert archive.class_names == source.class_names


def test_features_and_the_shift_of_logits_can_be_stored(tmp_path: Path):
    options = five_class_options(
        tmp_path / "a.zarr", signals=("layer2", "logits", "penultimate"), keep_shift=True, codec="float16"
    )
    cache_teacher(options)
    archive = redistill_cache.open_archive(options.out)
    teacher = Teacher(open_model(options.teacher), device=CPU, layers=("layer2", "penultimate"))
    signals = teacher(render_view(redistill.open_source(options.data), archive, 1)[:20])
    assert np.allclose(archive.logits(1, range(20)), signals["logits"].numpy(), atol=2e-3)
    assert archive.signals_of() == ("logits", "layer2", "penultimate")
    for layer in ("layer2", "penultimate"):
        exact, stored = signals[layer].numpy(), archive.features(1, range(20), layer=layer)
        relative = np.linalg.norm(stored - exact, axis=1) / np.linalg.norm(exact, axis=1)
        assert relative.max() <= options.feature_fidelity


def test_logits_of_reduced_precision(tmp_path: Path):
    """bfloat16 logits depend a little on the batch, so they are compared in the batches of the archive."""
    cache_teacher(cache_options(tmp_path / "a.zarr", amp=True, batch_size=16, views=1, codec="float16"))
    archive = redistill_cache.open_archive(tmp_path / "a.zarr")
    batches = [
        batch for block in render_view(redistill.open_source(DATA), archive).split(32) for batch in block.split(16)
    ]
    reduced = np.concatenate([online_logits(batch, amp=torch.bfloat16) for batch in batches])
    assert largest_kl(reduced, archive.logits(0)) <= 1e-6
    exact = np.concatenate([online_logits(batch) for batch in batches])
    assert largest_kl(exact, archive.logits(0)) > 1e-6, "bfloat16 was not used"
    assert archive.teachers["large"].model["precision"] == "bfloat16, final layer float32"


def test_logits_of_mixed_views(tmp_path: Path):
    cache_teacher(cache_options(tmp_path / "a.zarr", recipe="cifar?cutmix=1", views=1))
    archive, source = redistill_cache.open_archive(tmp_path / "a.zarr"), redistill.open_source(DATA)
    assert (archive.view_params(0)["mix_partner"] != np.arange(61)).any()
    assert largest_kl(online_logits(render_view(source, archive)), archive.logits(0)) <= 1e-3
    assert check_canaries(ViewDataset(source, archive, check=False), archive).verdict == "exact"


class Unlabelled:
    """Images of noise without labels, one of them of another size."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, i: int) -> Sample:
        shape = (40, 33, 3) if i == 1 else (32, 32, 3)
        return Sample(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8), -1, f"{i}.png")


def test_many_classes_are_stored_in_the_basis_of_the_head(tmp_path: Path):
    teacher = f"python:{odd_teachers.__name__}:ManyClasses?num_classes=120&norm=half&size=32"
    changes = {"teacher": teacher, "data": Unlabelled(20), "codec": "auto", "views": 1, "recipe": "center?size=32"}
    cache_teacher(cache_options(tmp_path / "a.zarr", allow_python=True, **changes))
    archive = redistill_cache.open_archive(tmp_path / "a.zarr")
    [signals] = describe(archive)["teachers"].values()
    assert signals["logits"]["config"]["basis"] == "head"
    assert largest_kl(online_logits(render_view(Unlabelled(20), archive), teacher), archive.logits(0)) <= 1e-3


@pytest.mark.parametrize("count", [1, 5])
def test_few_samples_without_labels(tmp_path: Path, count: int):
    result = cache_teacher(cache_options(tmp_path / "a.zarr", data=Unlabelled(count), views=1, codec="auto"))
    archive = redistill_cache.open_archive(tmp_path / "a.zarr")
    assert archive.logits(0).shape == (count, 10)
    assert (archive.labels == -1).all()
    assert result.teacher_top1 is None
    assert archive.class_names is None


def test_fewer_samples_than_a_batch(tmp_path: Path):
    cache_teacher(five_class_options(tmp_path / "a.zarr", data="synthetic?n=3&classes=5", views=1))
    assert redistill_cache.open_archive(tmp_path / "a.zarr").logits(0).shape == (3, 5)


def test_bad_images_are_excluded_and_listed(tmp_path: Path):
    for i in range(6):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    teacher = OTHER_TEACHER.replace("num_classes=10", "num_classes=2")
    options = cache_options(tmp_path / "a.zarr", data=f"folder:{tmp_path / 'images'}", teacher=teacher, views=1)
    with pytest.raises(Refused, match=r"5\.png.* exclude bad images"):
        cache_teacher(options)
    assert not options.out.exists()
    result = cache_teacher(replace(options, on_bad_image="exclude"))
    archive = redistill_cache.open_archive(options.out)
    assert (result.samples, len(archive.keys)) == (5, 5)
    assert [item["key"] for item in archive.spec.excluded] == ["b/5.png"]


def test_a_run_writes_a_note_of_its_provenance(tmp_path: Path):
    cache_teacher(cache_options(tmp_path / "a.zarr"))
    note = read_note(tmp_path / "a.zarr")
    assert (note["images"], note["labelled"], note["blocks"]) == (122, 122, 4)
    assert note["teacher_top1"] == note["right"] / note["labelled"]
    assert 0.5 < note["teacher_top1"] <= 1, "this teacher is trained"
    assert 0 <= note["relative_floor"] < 1e-3
    assert {"seconds", "images_per_second", "device", "environment", "command", "began", "share"} <= note.keys()
    model = redistill_cache.open_archive(tmp_path / "a.zarr").teachers["large"].model
    assert {"weights_digest", "precision", "device", "batch_size", "mean", "std"} <= model.keys()


class RecordWarnings(NoProgress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def test_a_teacher_at_chance_accuracy_gives_a_warning(tmp_path: Path):
    data = f"synthetic?{DIFFICULTY}&n={MIN_LABELLED}"
    for teacher, warnings in ((TEACHER, 0), (OTHER_TEACHER, 1)):
        progress = RecordWarnings()
        options = five_class_options(tmp_path / f"{warnings}.zarr", data=data, teacher=teacher, views=1, batch_size=64)
        cache_teacher(options, progress)
        assert len(progress.warnings) == warnings
        assert all("chance is 10.0%" in text for text in progress.warnings)


def warnings_about(out: Path, teacher: object, **changes: object) -> list[str]:
    """Of an estimate and of a run, which must be the same."""
    data = f"synthetic?{DIFFICULTY}&n={MIN_LABELLED}"
    options = five_class_options(out, data=data, teacher=teacher, views=1, batch_size=64, recipe="center", **changes)
    estimated, ran = RecordWarnings(), RecordWarnings()
    estimate_cache(options, estimated)
    cache_teacher(options, ran)
    assert estimated.warnings == ran.warnings
    return ran.warnings


def test_an_accuracy_below_half_of_the_known_one_gives_a_warning(tmp_path: Path):
    """A good teacher, on views of its own size and on those of another size or normalisation."""
    model = replace(open_model(TEACHER), top1=0.945)
    save_weights(model.module, tmp_path / "w.safetensors", model.metadata())
    teacher = f"{TEACHER_NETWORK}&weights={tmp_path / 'w.safetensors'}"
    assert warnings_about(tmp_path / "a.zarr", teacher) == []
    [warning] = warnings_about(tmp_path / "b.zarr", teacher, size=56)
    assert "views of 56 px, and 94.5% where it was published or trained" in warning
    [warning] = warnings_about(tmp_path / "c.zarr", f"{teacher}&mean=0.9,0.9,0.9&std=0.03,0.03,0.03")
    assert "check" in warning


def test_a_model_that_is_already_open_can_be_the_teacher(tmp_path: Path):
    module = open_model(TEACHER).module
    opened = open_model(module, num_classes=10, size=32, norm=(NORM.mean, NORM.std))
    options = {name: cache_options(tmp_path / name, teacher=t) for name, t in (("a", opened), ("b", TEACHER))}
    logits = {}
    for name, each in options.items():
        cache_teacher(each)
        logits[name] = redistill_cache.open_archive(each.out).logits(0)
    assert np.array_equal(logits["a"], logits["b"])


def test_views_of_a_small_archive_pass_through_the_teacher_once(tmp_path: Path):
    """The pilot is all of them, and its first batch the one that the teacher is checked with, which repeats 32 images
    twice. Finding the head takes two images."""
    module, images = open_model(TEACHER).module, []
    module.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    opened = open_model(module, num_classes=10, size=32, norm=(NORM.mean, NORM.std))
    # 250 is not a multiple of the block or batch size.
    options = cache_options(tmp_path / "a.zarr", teacher=opened, data=f"synthetic?{DIFFICULTY}&n=250", batch_size=48)
    cache_teacher(options)
    assert sum(images) == 500 + 2 * 32 + 2
    archive, source = redistill_cache.open_archive(options.out), redistill.open_source(options.data)
    for view in range(2):
        exact = online_logits(render_view(source, archive, view))
        assert largest_kl(exact, archive.logits(view)) < 1.001e-3


def test_nan_in_the_pilot_is_located(tmp_path: Path):
    """About nine of 3,600 views are NaN, none of them in the first batch."""
    options = five_class_options(tmp_path / "a.zarr", teacher=odd_teacher("RarelyNan"), views=40, allow_python=True)
    with pytest.raises(Refused, match=r"view \d+ of row \d+ \('train/"):
        cache_teacher(options)
    assert not options.out.exists(), "the pilot contains one of them, so no archive is created"


def test_nan_after_the_pilot_is_located_and_loses_one_block(tmp_path: Path):
    changes = {"data": "synthetic?n=400&classes=5", "teacher": odd_teacher("NanAfter700Images"), "allow_python": True}
    options = five_class_options(tmp_path / "a.zarr", **changes)
    with pytest.raises(Refused, match=r"NaN or infinity for view \d of row \d+ \('train/"):
        cache_teacher(options)
    partial = redistill_cache.open_archive(options.out, allow_partial=True)
    rows = partial.rows_available(0)
    assert 0 < len(rows) < 400
    assert np.isfinite(partial.logits(0, rows)).all()
