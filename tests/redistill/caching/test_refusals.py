"""Options, data and teachers that do not fit are refused in one line, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from redistill_cache import open_archive
from redistill_cache.errors import Refused, SpecMismatch, UsageError
from redistill_cache.subsets import plan_subset, write_subset
from redistill_cache.verify import verify

from redistill.caching import cache_teacher
from tests.attacks.forge import documents, forge
from tests.stage1 import file_hashes, five_class_options, odd_teacher


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "a.zarr"
    cache_teacher(five_class_options(path))
    return path


def test_a_teacher_of_an_earlier_version_with_rounded_logits_is_not_continued(tmp_path: Path):
    path = tmp_path / "a.zarr"
    cache_teacher(five_class_options(path, amp=True, views=1))
    root, teachers = documents(path)
    teachers["small"]["model"]["precision"] = "bfloat16"
    forge(path, root, teachers)
    with pytest.raises(SpecMismatch, match=r"earlier version, which rounded its logits to bfloat16.*--teacher-name"):
        cache_teacher(five_class_options(path, amp=True, views=2, extend_views=True))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"batch_size": 32}, "batch_size"),
        ({"fidelity": 1e-2}, "fidelity"),
        ({"compile": True}, "compile"),
        ({"citation": "me"}, "citation"),
        ({"views": 3, "extend_views": True, "seed": 1}, "seed"),
        ({"views": 3, "extend_views": True, "batch_size": 32}, "batch_size"),
        ({"codec": "float16"}, "codec"),
        ({"keep_shift": True}, "keep_shift"),
        ({"amp": True}, "precision"),
        ({"channels_last": False}, "channels_last"),
        ({"teacher": "demo:small?num_classes=5&weights=random&seed=1"}, "weights_digest"),
        ({"teacher": "demo:tiny?num_classes=5&weights=random", "teacher_name": "small"}, "name"),
        ({"views": 3}, "num_views"),
        ({"seed": 1}, "seed"),
        ({"recipe": "center"}, "now it is 'center?"),
        ({"size": 24}, "--recipe 'cifar?size=32"),
        ({"block_rows": 16}, "block_rows"),
        ({"licence": "MIT"}, "licence"),
        ({"data_source": "glyphs"}, "leave out --data-source"),
        ({"teacher_licence": "MIT"}, "leave out --teacher-licence"),
        ({"data": "synthetic?n=91&classes=5"}, "num_samples"),
        ({"data": "synthetic?n=90&classes=5&seed=3"}, "source.seed"),
    ],
)
def test_a_changed_option_is_refused_by_name_and_changes_nothing(archive: Path, changes: dict, field: str):
    before = file_hashes(archive)
    with pytest.raises(SpecMismatch) as error:
        cache_teacher(five_class_options(archive, **changes))
    assert field in str(error.value)
    assert "\n" not in str(error.value)
    assert file_hashes(archive) == before
    assert verify(archive).ok


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "synthetic?n=30&classes=6"}, "6 classes"),
        ({"data": "synthetic?n=30&classes=4"}, "4 classes"),
        ({"device": "cuda"}, "--device cpu"),
        ({"teacher": "demo:small?num_classes=5"}, "no weights"),
        ({"teacher": odd_teacher("FixedSize"), "size": 40}, "--size 32"),
        ({"teacher": odd_teacher("NanLogits")}, "NaN"),
        ({"teacher": odd_teacher("AlwaysTraining")}, "train mode"),
        ({"teacher": odd_teacher("CountsCalls")}, "state"),
        ({"teacher": odd_teacher("NanLogits"), "amp": True}, "try --no-amp"),
        ({"teacher": odd_teacher("NotDeterministic")}, "over the same images give different logits"),
        ({"teacher": odd_teacher("BatchDependent")}, "other images of the batch"),
        ({"teacher": odd_teacher("OutOfMemory")}, "ran out of memory on a batch of 16; try --batch-size 8"),
        ({"teacher": odd_teacher("NotDeterministic"), "allow_python": False}, "command line only"),
        ({"recipe": "center?size=32", "size": 32}, "both set the size of the views"),
        ({"signals": ("logits", "layer9")}, "layer9"),
        ({"extend_views": True}, "--extend-views"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one of the cases is a machine without GPU")
def test_unusable_data_or_teacher_is_refused_in_one_line(tmp_path: Path, changes: dict, message: str):
    options = five_class_options(tmp_path / "a.zarr", **{"allow_python": True, **changes})
    with pytest.raises((Refused, UsageError)) as error:
        cache_teacher(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not options.out.exists()


def test_changed_images_are_refused(tmp_path: Path):
    def write_image(i: int, seed: int) -> None:
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)

    for i in range(6):
        write_image(i, i)
    data, teacher = f"folder:{tmp_path / 'images'}", "demo:tiny?num_classes=2&weights=random"
    options = five_class_options(tmp_path / "a.zarr", data=data, teacher=teacher, views=1)
    cache_teacher(options)
    before = file_hashes(options.out)
    write_image(1, 99)
    for attempt in (options, replace(options, views=2, extend_views=True)):
        with pytest.raises(SpecMismatch, match="the sample index"):
            cache_teacher(attempt)
    write_image(6, 6)
    with pytest.raises(SpecMismatch, match=r"num_samples = 6.*7"):
        cache_teacher(options)
    assert file_hashes(options.out) == before


def test_a_path_that_cannot_become_an_archive(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="is a file"):
        cache_teacher(five_class_options(tmp_path / "file"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(Refused, match="holds files and is not an archive"):
        cache_teacher(five_class_options(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="URL"):
        five_class_options(Path("s3://bucket/a.zarr"))


@pytest.mark.parametrize(
    "option", [{"views": 0}, {"block_rows": 0}, {"size": 0}, {"workers": -1}, {"codec": "zip"}, {"fidelity": 2.0}]
)
def test_invalid_options(tmp_path: Path, option: dict):
    with pytest.raises(UsageError, match="--" + "|".join(option).replace("_", "-")):
        five_class_options(tmp_path / "a.zarr", **option)


def test_nothing_is_added_to_a_subset(archive: Path, tmp_path: Path):
    """Its rows and views have other numbers than those that their parameters were drawn with."""
    whole = open_archive(archive)
    changes: dict[str, Any]
    for name, views, rows, changes in (
        ("views", (1,), None, {"views": None, "teacher_name": "second"}),
        ("rows", (0, 1), np.arange(0, 90, 3), {"views": 3, "extend_views": True}),
    ):
        path = tmp_path / name
        write_subset(plan_subset(whole, path, views, rows))
        before = file_hashes(path)
        if True:
            with pytest.raises(
                Refused, match=f"is a subset of archive {whole.id}, so no teacher or views can be added"
            ):
                cache_teacher(five_class_options(path, **changes))
        assert file_hashes(path) == before
