"""Folders of FKD become archives: boxes, flips, soft labels of every kind, what was lost, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from redistill_cache import open_archive
from redistill_cache.errors import RedistillError, Refused, UsageError
from redistill_cache.verify import verify
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from redistill.caching import CacheOptions, cache_teacher
from redistill.interchange import importing
from redistill.interchange.fkd import parse_record
from redistill.interchange.importing import ImportResult, import_archive
from redistill.interchange.options import ImportOptions
from redistill.interchange.probabilities import check_top, logits_of_top
from redistill.sources.images import decode_image
from redistill.views import ViewDataset
from tests.redistill.interchange.fkd_files import CROPS, write_fkd

RECIPE = "rrc?size=24&interpolation=bicubic"


def load(source: Path, images: Path, out: Path, **changed) -> ImportResult:
    settings = {"recipe": RECIPE, "codec": "float32", **changed}
    dry_run = settings.pop("dry_run", False)
    options = ImportOptions(source=source, layout="fkd", data=f"folder:{images}", out=out, **settings)
    return import_archive(options, dry_run=dry_run)


def softmax(rows: np.ndarray) -> np.ndarray:
    exponentials = np.exp(rows - rows.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def marginal(probabilities: np.ndarray, kept: int) -> np.ndarray:
    """What FKD's trainer makes of the largest probabilities."""
    order = np.argsort(-probabilities, 1, kind="stable")[:, :kept]
    top = np.take_along_axis(probabilities, order, 1)
    rows = np.repeat((1 - top.sum(1, keepdims=True)) / (probabilities.shape[1] - kept), probabilities.shape[1], 1)
    np.put_along_axis(rows, order, top, 1)
    return rows


@pytest.mark.parametrize(
    ("kind", "dtype", "tensors"),
    [
        ("marginal", "float32", False),
        ("smoothing", "float16", True),
        ("full", "float16", False),
    ],
)
def test_boxes_flips_and_labels_are_those_of_the_source(tmp_path: Path, images, keys, logits, kind, dtype, tensors):
    views = write_fkd(tmp_path / "fkd", images, keys, logits, kind=kind, dtype=dtype, tensors=tensors)
    result = load(tmp_path / "fkd", images, tmp_path / "a", codec="float32" if tensors else "auto", fidelity=1e-6)
    archive = open_archive(tmp_path / "a", id=result.id)
    assert (archive.num_views, list(archive.keys)) == (CROPS, keys)
    for view in range(CROPS):
        params, stored = archive.view_params(view), softmax(archive.logits(view).astype(np.float64))
        assert params["crop"].tolist() == [views[key].boxes[view].tolist() for key in keys]
        assert params["flip"].tolist() == [int(views[key].flip[view]) for key in keys]
        expected = np.stack([views[key].probabilities[view] for key in keys])
        if kind != "full":
            expected = marginal(expected, 3 if kind == "marginal" else 1)
        np.testing.assert_allclose(stored, expected, atol=2e-3 if dtype == "float16" else 1e-3)
    assert archive.codec("imported").name == ("topk" if kind != "full" else "linear")
    assert verify(tmp_path / "a", full=True).ok
    audit = " | ".join(result.audit)
    assert "temperature of the probabilities: not in the source" in audit
    assert ("the source keeps the" in audit) == (kind != "full")
    assert ("the source has float16" in audit) == (dtype == "float16")


def test_a_view_has_the_pixels_of_the_crop_resized_then_flipped(tmp_path: Path, images, keys, logits):
    """As FKD's trainer makes them: crop, resize, flip."""
    views = write_fkd(tmp_path / "fkd", images, keys, logits)
    load(tmp_path / "fkd" / "train", images, tmp_path / "a")
    dataset = ViewDataset(f"folder:{images}", open_archive(tmp_path / "a"))
    for row, key in list(enumerate(keys))[::7]:
        image = decode_image((images / key).read_bytes(), name=key)
        for view in range(CROPS):
            box = views[key].boxes[view].tolist()
            mode = InterpolationMode.BICUBIC
            expected = F.resize_image(F.crop_image(image, *box), [24, 24], interpolation=mode, antialias=True)
            expected = F.horizontal_flip_image(expected) if views[key].flip[view] else expected
            assert torch.equal(dataset[dataset.index(view, row)].pixels, expected)


def test_first_views_temperature_and_both_pickle_forms(tmp_path: Path, images, keys, logits):
    for name, legacy in (("new", False), ("old", True)):
        views = write_fkd(tmp_path / name, images, keys, logits, kind="full", tensors=True, legacy=legacy)
        load(tmp_path / name, images, tmp_path / f"{name}.a", views=2, temperature=3.0)
    new, old = open_archive(tmp_path / "new.a"), open_archive(tmp_path / "old.a")
    assert new.id == old.id
    assert new.num_views == 2
    expected = np.stack([views[key].probabilities[1] for key in keys])
    np.testing.assert_allclose(softmax(new.logits(1).astype(np.float64) / 3.0), expected, atol=1e-5)
    assert "views: the first 2 of 4 crops" in new.teacher("imported").model["audit"]


def test_few_views_at_a_time_give_the_same_archive(tmp_path: Path, images, keys, logits, monkeypatch):
    """Memory is bounded by reading some views of a block at a time; an interrupted import is continued."""
    write_fkd(tmp_path / "fkd", images, keys, logits)
    whole = load(tmp_path / "fkd", images, tmp_path / "whole", block_rows=16).id
    monkeypatch.setattr(importing, "READ_BYTES", 1)
    assert load(tmp_path / "fkd", images, tmp_path / "one", block_rows=16).id == whole
    records = tmp_path / "one" / "_redistill" / "blocks"
    for name in ("views.1.1", "teachers.imported.3.0", "canaries.2.0"):
        (records / f"{name}.json").unlink()
    (tmp_path / "one" / "_redistill" / "manifest.json").unlink()
    assert load(tmp_path / "fkd", images, tmp_path / "one", block_rows=16).id == whole


def test_no_teacher_is_added_to_views_that_stage_1_did_not_draw(tmp_path: Path, images, keys, logits):
    write_fkd(tmp_path / "fkd", images, keys, logits)
    path = tmp_path / "a"
    before = load(tmp_path / "fkd", images, path).id
    teacher = "demo:tiny?num_classes=5&weights=random"
    with pytest.raises(Refused, match="not drawn from its seed but imported"):
        cache_teacher(CacheOptions(data=f"folder:{images}", teacher=teacher, out=path, teacher_name="b", workers=0))
    assert open_archive(path, verify="full").id == before
    assert not (path / "teachers" / "b").exists()


def test_losses_of_float16_are_counted():
    """Boxes that float16 may have moved, zeros, and a tail that does not fit."""
    ids, top = np.array([[0, 1]]), np.array([[1.0, 0.0]], np.float16)
    counts = check_top(ids, top, 1000, "here")
    assert counts["probabilities that float16 rounded to 0, stored as half of its smallest number"] == 1
    assert counts["views whose other classes have no mass: it was dropped, or rounded away"] == 1
    rows = logits_of_top(ids, top, 1000, 1.0)
    assert np.isfinite(rows).all()
    assert rows[0, :2] == pytest.approx([0, np.log(2.0**-25)])
    assert rows[0, 2] <= rows[0, 1]
    loose = np.array([[0.9995, 1e-7]], np.float32)
    assert sum(check_top(ids, loose, 1000, "here").values()) == 1
    assert logits_of_top(ids, loose, 1000, 1.0)[0, 2:].max() <= np.log(np.float32(1e-7)) + 1e-6
    with pytest.raises(Refused, match="not the largest probabilities"):
        check_top(ids, np.array([[0.9, 1e-5]], np.float32), 1000, "here")


def test_boxes_in_float16_of_a_large_image_are_counted(tmp_path: Path):
    images = tmp_path / "images" / "c0"
    images.mkdir(parents=True)
    Image.new("RGB", (3000, 600)).save(images / "large.png")
    (tmp_path / "images" / "c1").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "c1" / "small.png")
    (tmp_path / "images" / "c2").mkdir()
    Image.new("RGB", (40, 41)).save(tmp_path / "images" / "c2" / "other.png")
    keys = ["c0/large.png", "c1/small.png", "c2/other.png"]
    logits = np.eye(3) * 3
    views = write_fkd(tmp_path / "fkd", tmp_path / "images", keys, logits, kind="full", dtype="float16")
    boxes = np.array([[590, 0, 10, 3000], [1, 1501, 599, 1499], [3, 7, 21, 9], [0, 0, 600, 3000]])
    view = views["c0/large.png"]
    view.boxes = boxes
    content = [view.coords("float16"), view.flip, view.labels("full", "float16")]
    torch.save(content, tmp_path / "fkd" / "train" / "c0" / "large.tar")
    result = load(tmp_path / "fkd", tmp_path / "images", tmp_path / "a")
    stored = np.stack([open_archive(tmp_path / "a").view_params(view, [0])["crop"][0] for view in range(4)])
    assert (np.abs(stored - boxes) <= 1).all()
    assert (stored[:, :2] + stored[:, 2:] <= [600, 3000]).all()
    assert any("crops with an edge that float16 may have moved" in sentence for sentence in result.audit)


def resaved(change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    """An attack: the first file with a changed content."""

    def attack(root: Path) -> None:
        path = min((root / "train").rglob("*.tar"))
        torch.save(change([value.numpy() for value in torch.load(path)]), path)

    return attack


def with_coords(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return resaved(lambda content: [change(content[0]), *content[1:]])


def with_labels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return resaved(lambda content: [*content[:2], change(content[2])])


def cut(root: Path) -> None:
    path = max((root / "train").rglob("*.tar"))
    path.write_bytes(path.read_bytes()[:-300])


def linked(root: Path) -> None:
    (root / "train" / "c0" / "up.tar").symlink_to("/etc/passwd")


def exploit(root: Path) -> None:
    class Calls:
        def __reduce__(self):
            return os.system, ("touch redistill_attack",)

    torch.save([Calls()], min((root / "train").rglob("*.tar")))


def set_value(array: np.ndarray, at: tuple[int, ...], value: float) -> np.ndarray:
    array[at] = value
    return array


ATTACKS = {
    "system": exploit,
    "damaged": cut,
    "symbolic link": linked,
    "list of coords, flip and labels, found 2 values": resaved(lambda content: content[:2]),
    "coords as floats": with_coords(lambda coords: coords[:, :3]),
    "no whole pixels": with_coords(lambda coords: coords * np.float32(0.99)),
    "outside of": with_coords(lambda coords: coords + np.float32([0, 0, 1, 1])),
    "no whole pixels of an": with_coords(lambda coords: set_value(coords, (0, 0), np.nan)),
    "found NaN": with_labels(lambda labels: set_value(labels, (1, 1, 0), np.nan)),
    "classes from 0 to 4": with_labels(lambda labels: set_value(labels, (0, 0, 0), 5)),
    "two probabilities of the same class": with_labels(lambda labels: set_value(labels, (0, 0, 0), labels[0, 0, 1])),
    "whole numbers as classes": with_labels(lambda labels: set_value(labels, (0, 0, 0), 1.5)),
    "sum to at most 1": with_labels(lambda labels: set_value(labels, (0, 1, 2), 1.0)),
    "from 0 to 1": with_labels(lambda labels: set_value(labels, (0, 1, 2), -0.5)),
    "another kind": resaved(lambda content: [content[0], content[1], content[2][:, :, :2]]),
    "hard labels": with_labels(lambda labels: labels[:, 0, 0]),
    "labels as floats for 4 crops": with_labels(lambda labels: labels[:3]),
}


@pytest.mark.parametrize("reason", ATTACKS)
def test_wrong_and_hostile_files_are_refused_before_anything_is_written(
    tmp_path: Path, images, keys, logits, monkeypatch, reason: str
):
    monkeypatch.chdir(tmp_path)
    write_fkd(tmp_path / "fkd", images, keys, logits, tensors=True)
    ATTACKS[reason](tmp_path / "fkd")
    with pytest.raises(RedistillError) as refusal:
        load(tmp_path / "fkd", images, tmp_path / "a")
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fkd"]


def test_what_the_labels_cannot_say(images, tmp_path: Path, keys, logits):
    coords, flip = np.zeros((2, 4), np.float32), np.zeros(2, bool)
    with pytest.raises(Refused, match="exact up to 2048 only"):
        parse_record([coords, flip, np.zeros((2, 2, 3), np.float16)], 3000)
    with pytest.raises(Refused, match="of two classes may be"):
        parse_record([coords, flip, np.full((2, 2), 0.5, np.float32)], 2)
    write_fkd(tmp_path / "fkd", images, keys, logits)
    with pytest.raises(UsageError, match="add --classes"):
        load(tmp_path / "fkd", f"{images}?labels=none", tmp_path / "a")
    with pytest.raises(UsageError, match="crops and horizontal flips, nothing else"):
        load(tmp_path / "fkd", images, tmp_path / "a", recipe="rrc?size=24&mixup=0.2")
    result = load(tmp_path / "fkd", images, tmp_path / "a", recipe=None, dry_run=True)
    assert "size and interpolation: not in the source; assumed to be 224 px and bilinear" in result.audit
    (tmp_path / "fkd" / "train" / "c0" / "x.tar").write_bytes(b"")
    (tmp_path / "fkd" / "train" / "c0" / "i00.tar").rename(tmp_path / "kept.tar")
    with pytest.raises(Refused, match=r"1 images of the data without logits .*; 1 names without an image"):
        load(tmp_path / "fkd", images, tmp_path / "a")
