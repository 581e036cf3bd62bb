"""What stage 1 stores is what the teacher says of the views that students will see, whatever data and teacher are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redistill_cache
import torch
from PIL import Image
from redistill_cache.codecs import kl_rows
from redistill_cache.inspect import describe

import redistill
from redistill.caching import cache_teacher
from redistill.models import open_model
from redistill.sources.base import Sample
from redistill.teachers import Teacher
from redistill.views.canaries import check_canaries
from redistill.views.view_params import join_archive
from tests import odd_teachers
from tests.stage1 import DATA, OTHER_TEACHER, TEACHER, asked, note_of

CPU = torch.device("cpu")


def rendered(source: object, archive: redistill_cache.Archive) -> torch.Tensor:
    """Every row of the first view, made again from the archive alone."""
    return torch.stack([redistill.render(source, archive, row, 0) for row in range(archive.num_samples)])


def online(pixels: torch.Tensor, spec: str = TEACHER, **options) -> np.ndarray:
    return Teacher(open_model(spec, allow_python=True), device=CPU, **options)(pixels)["logits"].numpy()


def worst_kl(exact: np.ndarray, stored: np.ndarray) -> float:
    return max(float(kl_rows(exact, stored, t).max()) for t in (1.0, 4.0))


def test_reduced_precision_is_stored_as_it_was_said(tmp_path: Path):
    """bfloat16 answers differ a little by batch, so they are asked for in the batches of the archive."""
    cache_teacher(asked(tmp_path / "a.zarr", amp=True, batch_size=16, views=1, codec="float16"))
    archive = redistill_cache.open_archive(tmp_path / "a.zarr")
    batches = [batch for block in rendered(redistill.open_source(DATA), archive).split(32) for batch in block.split(16)]
    said = np.concatenate([online(batch, amp=torch.bfloat16) for batch in batches])
    assert worst_kl(said, archive.logits(0)) <= 1e-6
    exact = np.concatenate([online(batch) for batch in batches])
    assert worst_kl(exact, archive.logits(0)) > 1e-6, "bfloat16 was never used"
    assert archive.teachers["large"].model["precision"] == "bfloat16"


def test_mixed_views_are_answered_for_as_mixed(tmp_path: Path):
    cache_teacher(asked(tmp_path / "a.zarr", recipe="cifar?cutmix=1", views=1))
    archive, source = redistill_cache.open_archive(tmp_path / "a.zarr"), redistill.open_source(DATA)
    assert (archive.view_params(0)["mix_partner"] != np.arange(61)).any()
    assert worst_kl(online(rendered(source, archive)), archive.logits(0)) <= 1e-3
    assert check_canaries(source, archive, join_archive(source, archive)).verdict == "exact"


class Nameless:
    """Noise that nobody has labelled, with one image of another size."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, i: int) -> Sample:
        shape = (40, 33, 3) if i == 1 else (32, 32, 3)
        return Sample(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8), -1, f"{i}.png")


def test_many_classes_are_stored_in_the_axes_of_the_head(tmp_path: Path):
    wide = f"python:{odd_teachers.__name__}:wide?num_classes=120&norm=half&size=32"
    changed = {"teacher": wide, "data": Nameless(20), "codec": "auto", "views": 1, "recipe": "center?size=32"}
    cache_teacher(asked(tmp_path / "a.zarr", allow_python=True, **changed))
    archive = redistill_cache.open_archive(tmp_path / "a.zarr")
    [signals] = describe(archive)["teachers"].values()
    assert signals["logits"]["config"]["basis"] == "head"
    assert worst_kl(online(rendered(Nameless(20), archive), wide), archive.logits(0)) <= 1e-3


@pytest.mark.parametrize("count", [1, 5])
def test_few_samples_without_labels(tmp_path: Path, count: int):
    result = cache_teacher(asked(tmp_path / "a.zarr", data=Nameless(count), views=1, codec="auto"))
    archive = redistill_cache.open_archive(tmp_path / "a.zarr")
    assert archive.logits(0).shape == (count, 10)
    assert (archive.labels == -1).all()
    assert result.teacher_top1 is None
    assert archive.class_names is None


def test_bad_images_are_left_out_and_listed(tmp_path: Path):
    for i in range(6):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    teacher = OTHER_TEACHER.replace("num_classes=10", "num_classes=2")
    options = asked(tmp_path / "a.zarr", data=f"folder:{tmp_path / 'images'}", teacher=teacher, views=1)
    with pytest.raises(redistill_cache.errors.Refused, match=r"5\.png.* exclude bad images"):
        cache_teacher(options)
    assert not options.out.exists()
    result = cache_teacher(replace(options, on_bad_image="exclude"))
    archive = redistill_cache.open_archive(options.out)
    assert (result.samples, len(archive.keys)) == (5, 5)
    assert [item["key"] for item in archive.spec.excluded] == ["b/5.png"]


def test_every_run_leaves_a_note(tmp_path: Path):
    cache_teacher(asked(tmp_path / "a.zarr"))
    note = note_of(tmp_path / "a.zarr")
    assert (note["images"], note["labelled"], note["blocks"]) == (122, 122, 4)
    assert note["teacher_top1"] == note["right"] / note["labelled"]
    assert 0.5 < note["teacher_top1"] <= 1, "this teacher has learned something"
    assert 0 <= note["relative_floor"] < 1e-3
    assert {"seconds", "images_per_second", "device", "environment", "command", "began", "rank"} <= note.keys()
    model = redistill_cache.open_archive(tmp_path / "a.zarr").teachers["large"].model
    assert {"weights_digest", "precision", "device", "batch_size", "mean", "std"} <= model.keys()
