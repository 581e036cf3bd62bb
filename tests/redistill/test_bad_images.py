"""Images that cannot be decoded, and images that change: what both stages, verify and evaluate do with them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from redistill_cache import open_archive
from redistill_cache.errors import Refused

from redistill.caching import CacheOptions, cache_teacher
from redistill.evaluate import evaluate
from redistill.optim import OptimConfig
from redistill.progress import NoProgress
from redistill.sources.images import BadImage
from redistill.training import TrainOptions, train
from redistill.views import ViewDataset
from redistill.views.aligned import aligned_views
from redistill.views.dataset import render

TEACHER = "demo:tiny?num_classes=3&weights=random"
PNG_END = b"IEND\xaeB`\x82"


class Messages(NoProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def info(self, text: str) -> None:
        self.messages.append(text)


def write_images(root: Path, per_class: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for name in "abc":
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(root / name / f"{i:02d}.png")
    return root


def spoil(image: Path) -> None:
    """Half of the pixels, with the end marker of the format, as a disk or a copy leaves them."""
    data = image.read_bytes()
    image.write_bytes(data[: len(data) // 2] + b"\0\0\0\0" + PNG_END)


def cache(data: Path, out: Path, **changes: object) -> CacheOptions:
    options = {"teacher": TEACHER, "views": 2, "batch_size": 16, "workers": 0, "recipe": "rrc?size=32"}
    return CacheOptions(data=f"folder:{data}", out=out, **{**options, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def spoiled(folder: Path) -> Path:
    spoil(folder / "a" / "03.png")
    spoil(folder / "c" / "19.png")
    return folder


def options(data: Path, archive: Path, out: Path, **changes: object) -> TrainOptions:
    values: dict[str, object] = {"students": ("demo:tiny",), "workers": 0, "batch_size": 16, "size": 32}
    values["optim"] = OptimConfig(epochs=1)
    return TrainOptions(data=f"folder:{data}", archive=archive, out=out, **{**values, **changes})


def test_the_folder_that_an_archive_was_made_from_is_usable_although_it_has_bad_images(spoiled: Path, tmp_path: Path):
    archive, messages = tmp_path / "a.zarr", Messages()
    with pytest.raises(BadImage, match=r"a/03\.png.*exclude bad images"):
        cache_teacher(cache(spoiled, archive))
    assert not archive.exists()
    cache_teacher(cache(spoiled, archive, on_bad_image="exclude"), messages)
    (told,) = [text for text in messages.messages if "excluded" in text]
    assert told.startswith("excluded images: 2 (a/03.png: ")
    opened = open_archive(archive)
    assert [item["key"] for item in opened.spec.excluded] == ["a/03.png", "c/19.png"]

    messages = Messages()
    (result,) = train(options(spoiled, archive, tmp_path / "run"), messages)
    assert "images that the archive excludes, and that are skipped: 2" in messages.messages
    assert result.epochs == 1
    assert aligned_views(f"folder:{spoiled}", opened).joined.exact
    assert len(ViewDataset(f"folder:{spoiled}", opened)) == 2 * 58
    assert render(f"folder:{spoiled}", opened, 57, 1).shape == (3, 32, 32)
    train(options(spoiled, archive, tmp_path / "share", val="0.2"))
    evaluation = evaluate(tmp_path / "run", f"folder:{spoiled}", archive=archive, workers=0)
    assert evaluation.metrics.rows == 58


def test_an_excluded_image_that_is_healthy_again_is_still_left_out(spoiled: Path, tmp_path: Path):
    cache_teacher(cache(spoiled, tmp_path / "a.zarr", on_bad_image="exclude"))
    healthy = (spoiled / "b" / "00.png").read_bytes()
    (spoiled / "a" / "03.png").write_bytes(healthy[:-12] + healthy[-12:])
    views = aligned_views(f"folder:{spoiled}", open_archive(tmp_path / "a.zarr"))
    assert (views.excluded, views.joined.counts["extra"]) == (2, 0)


def test_an_archive_is_extended_without_the_images_that_it_excludes(spoiled: Path, tmp_path: Path):
    out = tmp_path / "a.zarr"
    cache_teacher(cache(spoiled, out, on_bad_image="exclude"))
    excluded = open_archive(out).spec.excluded
    (spoiled / "c" / "19.png").write_bytes((spoiled / "b" / "00.png").read_bytes())  # healthy again
    cache_teacher(cache(spoiled, out, views=3, extend_views=True))  # without the option
    assert (open_archive(out).num_views, open_archive(out).spec.excluded) == (3, excluded)


def test_a_bad_image_that_the_archive_does_not_exclude_is_refused(spoiled: Path, tmp_path: Path):
    cache_teacher(cache(spoiled, tmp_path / "a.zarr", on_bad_image="exclude"))
    (spoiled / "b" / "05.png").write_bytes(b"not an image")
    with pytest.raises(BadImage, match=r"b/05\.png"):
        train(options(spoiled, tmp_path / "a.zarr", tmp_path / "run"))


def test_validation_images_are_excluded_by_option(folder: Path, tmp_path: Path):
    archive, val = tmp_path / "a.zarr", write_images(tmp_path / "val", per_class=5)
    cache_teacher(cache(folder, archive))
    spoil(val / "a" / "01.png")
    with pytest.raises(BadImage, match=r"a/01\.png"):
        train(options(folder, archive, tmp_path / "run", val=f"folder:{val}"))
    (result,) = train(options(folder, archive, tmp_path / "run", val=f"folder:{val}", on_bad_image="exclude"))
    assert result.evaluation is not None
    with pytest.raises(BadImage):
        evaluate(tmp_path / "run", f"folder:{val}", workers=0)
    assert evaluate(tmp_path / "run", f"folder:{val}", workers=0, on_bad_image="exclude").metrics.rows == 14


def swap(folder: Path, first: str, second: str) -> None:
    """Two images of the same size change places; their sizes and modification times stay."""
    one, two = folder / first, folder / second
    contents = one.read_bytes(), two.read_bytes()
    times = [(path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in (one, two)]
    one.write_bytes(contents[1])
    two.write_bytes(contents[0])
    for path, time in zip((one, two), times, strict=True):
        os.utime(path, ns=time)


class SwapDuring(Messages):
    """Images change while the teacher runs, after the self-test."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.batches = 0

    def advance(self, task: str, *_: object, **__: object) -> None:
        self.batches += task == "teacher"
        if self.batches == 5:
            swap(self.folder, "c/00.png", "c/01.png")


def test_images_that_change_while_stage_1_runs_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # A pilot of all views keeps what the teacher said of them; of a larger set it would not.
    monkeypatch.setattr("redistill.caching.pilot.MAX_KEPT_VALUES", 0)
    progress = SwapDuring(folder)
    with pytest.raises(Refused, match=r"image 'c/0[01]\.png' has changed since it was indexed"):
        cache_teacher(cache(folder, tmp_path / "a.zarr", block_rows=16), progress)
    assert progress.batches >= 5
    swap(folder, "c/00.png", "c/01.png")
    cache_teacher(cache(folder, tmp_path / "a.zarr", block_rows=16))
    cache_teacher(cache(folder, tmp_path / "straight.zarr", block_rows=16))
    assert open_archive(tmp_path / "a.zarr").id == open_archive(tmp_path / "straight.zarr").id


def test_images_that_change_while_a_loop_runs_are_refused(folder: Path, tmp_path: Path):
    cache_teacher(cache(folder, tmp_path / "a.zarr"))
    dataset = ViewDataset(f"folder:{folder}", open_archive(tmp_path / "a.zarr"))
    assert dataset[dataset.index(0, 40)].row == 40
    swap(folder, "c/00.png", "c/01.png")
    with pytest.raises(Refused, match=r"image 'c/00\.png' has changed since it was indexed"):
        dataset[dataset.index(0, 40)]


def test_files_in_other_formats_are_named_once(folder: Path, tmp_path: Path):
    for name in ("a/x.avif", "a/y.AVIF", "b/notes.txt", "c/README"):
        (folder / name).write_bytes(b"x")
    messages = Messages()
    cache_teacher(cache(folder, tmp_path / "a.zarr"), messages)
    (told,) = [text for text in messages.messages if "not read" in text]
    assert told.startswith("files that are not read: 2 .avif, 1 .txt, 1 without extension; images end in .jpg")


def test_full_verification_reads_every_image_anew(folder: Path, tmp_path: Path):
    cache_teacher(cache(folder, tmp_path / "a.zarr"))
    hour_ago = os.stat(folder).st_mtime_ns - 3600 * 10**9  # noqa: PTH116
    for image in folder.rglob("*.png"):
        os.utime(image, ns=(hour_ago, hour_ago))
    archive = open_archive(tmp_path / "a.zarr")
    assert aligned_views(f"folder:{folder}", archive).hashed == 60
    assert aligned_views(f"folder:{folder}", archive).hashed == 0
    assert aligned_views(f"folder:{folder}", archive, reuse=False).hashed == 60


def test_an_image_that_was_replaced_with_its_times_restored_is_read_again(folder: Path, tmp_path: Path):
    cache_teacher(cache(folder, tmp_path / "a.zarr"))
    image = folder / "b" / "07.png"
    hour_ago = image.stat().st_mtime_ns - 3600 * 10**9
    os.utime(image, ns=(hour_ago, hour_ago))
    archive = open_archive(tmp_path / "a.zarr")
    assert aligned_views(f"folder:{folder}", archive).joined.exact
    data = bytearray(image.read_bytes())
    data[60] ^= 1
    image.write_bytes(data)
    os.utime(image, ns=(hour_ago, hour_ago))
    with pytest.raises(Refused, match=r"1 changed \('b/07\.png'\)|cannot be used"):
        aligned_views(f"folder:{folder}", archive)
