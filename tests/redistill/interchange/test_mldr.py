"""Folders of ml-dr become archives where their augmentations are crops and flips; others are refused."""

from __future__ import annotations

import shutil
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

from redistill.interchange.importing import ImportResult, import_archive
from redistill.interchange.options import ImportOptions

VIEWS, KEPT = 3, 2
CONFIG = {"random_resized_crop": {"size": 24}, "random_horizontal_flip": {"p": 0.5}, "to_tensor": {}, "mixup": None}


def view_of(size: tuple[int, int], rng: np.random.Generator, classes: int) -> dict[str, Any]:
    height, width = int(rng.integers(5, size[0] + 1)), int(rng.integers(5, size[1] + 1))
    box = int(rng.integers(0, size[0] + 1 - height)), int(rng.integers(0, size[1] + 1 - width)), height, width
    probabilities = rng.dirichlet(np.ones(classes))
    kept = rng.permutation(np.argsort(-probabilities)[:KEPT])
    return {"params": [box, bool(rng.random() < 0.5)], "prob": (probabilities[kept].tolist(), kept.tolist())}


def write_mldr(root: Path, images: Path, keys: list[str], *, as_dict: bool = False) -> list[list[dict[str, Any]]]:
    """root/<position>.pth.tar for every image, and the settings."""
    root.mkdir()
    rng, written = np.random.default_rng(5), []
    for position, key in enumerate(keys):
        with Image.open(images / key) as image:
            views = [view_of((image.height, image.width), rng, 5) for _ in range(VIEWS)]
        written.append(views)
        names = ("random_resized_crop", "random_horizontal_flip")
        stored = [{**v, "params": dict(zip(names, v["params"], strict=True)) | {"to_tensor": ()}} for v in views]
        torch.save((position, stored if as_dict else views), root / f"{position}.pth.tar", pickle_protocol=4)
    torch.save({"reinforce": {"num_samples": VIEWS, "image_augmentation": CONFIG}}, root / "config.pth.tar")
    return written


def load(source: Path, images: Path, out: Path, **changed) -> ImportResult:
    settings = {"recipe": "rrc?size=24", **changed}
    return import_archive(ImportOptions(source=source, layout="ml-dr", data=f"folder:{images}", out=out, **settings))


@pytest.mark.parametrize("as_dict", [False, True])
def test_crops_flips_and_probabilities_are_those_of_the_source(tmp_path: Path, images, keys, as_dict: bool):
    written = write_mldr(tmp_path / "dr", images, keys, as_dict=as_dict)
    load(tmp_path / "dr", images, tmp_path / "a")
    archive = open_archive(tmp_path / "a")
    assert list(archive.keys) == keys
    for view in range(VIEWS):
        params, rows = archive.view_params(view), archive.logits(view).astype(np.float64)
        stored = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
        for row, views in enumerate(written):
            (box, flip), (top, ids) = views[view]["params"], views[view]["prob"]
            assert (tuple(params["crop"][row].tolist()), bool(params["flip"][row])) == (box, flip)
            np.testing.assert_allclose(stored[row, ids], top, atol=1e-5)
    assert verify(tmp_path / "a").ok
    model = archive.teacher("imported").model
    assert model["imported"]["layout"] == "ml-dr"
    assert any("found by their position" in sentence for sentence in model["audit"])


def changed(number: int, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def attack(root: Path) -> None:
        path = root / f"{number}.pth.tar"
        torch.save(change(torch.load(path, weights_only=False)), path)

    return attack


def changed_view(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    return changed(4, lambda content: (content[0], [*content[1][:-1], change(content[1][-1])]))


def configured(**augmentation) -> Callable[[Path], None]:
    settings = {"reinforce": {"image_augmentation": CONFIG | augmentation}}
    return lambda root: torch.save(settings, root / "config.pth.tar")


ATTACKS = {
    "it says that it is of image 5": changed(4, lambda content: (5, content[1])),
    "expected (position, list of views)": changed(4, lambda content: [content]),
    "found mixup, random_horizontal_flip": configured(mixup={"alpha": 0.2}),
    "rand_augment": configured(rand_augment={"num_ops": 2}),
    "center_crop": configured(center_crop={"size": 24}),
    "flip alone, found random_resized_crop, to_tensor; others": configured(random_horizontal_flip=None),
    "reinforce.image_augmentation": lambda root: torch.save([], root / "config.pth.tar"),
    "expected a folder of ml-dr": lambda root: (root / "config.pth.tar").unlink(),
    "is outside of an image": changed_view(lambda view: {**view, "params": [(30, 0, 60, 9), True]}),
    "expected views of": changed_view(lambda view: {**view, "params": [(0, 0, 9, 9), True, None]}),
    "expected views of {": changed_view(lambda view: {**view, "params": [None, (0, 0, 9, 9), True]}),
    "different numbers": changed_view(lambda view: {**view, "prob": ([0.5], [1])}),
    "3 views of 2 probabilities": changed(4, lambda content: (4, content[1][:2])),
    "sum to at most 1": changed_view(lambda view: {**view, "prob": ([0.9, 0.9], [0, 1])}),
    "same class": changed_view(lambda view: {**view, "prob": ([0.5, 0.4], [1, 1])}),
    "images of the data without logits": lambda root: (root / "29.pth.tar").unlink(),
    "names without an image": lambda root: (root / "30.pth.tar").write_bytes((root / "29.pth.tar").read_bytes()),
}


def test_what_cannot_be_imported_exactly_is_refused(tmp_path: Path, images, keys):
    for number, (reason, attack) in enumerate(ATTACKS.items()):
        root = tmp_path / str(number)
        write_mldr(root, images, keys)
        attack(root)
        with pytest.raises(RedistillError) as refusal:
            load(root, images, tmp_path / "a")
        assert reason in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="found by their position"):
        load(root, images, tmp_path / "a", accept=("missing",))
    shutil.copytree(images, tmp_path / "nested" / "outer")
    with pytest.raises(Refused, match="use a folder of class folders"):
        load(root, tmp_path / "nested", tmp_path / "a")
