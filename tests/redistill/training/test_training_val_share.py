"""`--val 0.1`: a share of the training images, held out of every class."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from redistill_cache import open_archive
from redistill_cache.errors import Refused, SpecMismatch, UsageError

from redistill.devices import pick_device
from redistill.progress import NoProgress
from redistill.ranks import Rank, World
from redistill.training import TrainOptions, train
from redistill.training.options import read_config
from redistill.training.prepare import held_out_rows, prepare
from tests.small_archive import cache


class Infos(NoProgress):
    def __init__(self) -> None:
        self.infos: list[str] = []

    def info(self, text: str) -> None:
        self.infos.append(text)


def prepared(options: TrainOptions, progress=None):
    return prepare(options, World(Rank(), pick_device("cpu")), progress or NoProgress())


def test_the_share_of_every_class_is_validated_on_and_never_trained_on(options, archive: Path):
    progress = Infos()
    run = options(val="0.2", epochs=3)
    setup = prepared(run, progress)
    rows, labels = held_out_rows(open_archive(archive), 0.2, 0), np.asarray(open_archive(archive).labels)
    of_class, held = np.bincount(labels, minlength=8), np.bincount(labels[rows], minlength=8)
    assert held.tolist() == [round(0.2 * count) for count in of_class.tolist()]
    assert f"validation: {len(rows)} of 150 images are held out, the share 0.2 of every class, drawn with" in " ".join(
        progress.infos
    )
    trained = {int(row) for epoch in range(3) for batch in setup.feed.global_batches(epoch) for row in batch}
    assert trained == set(range(150)) - set(rows.tolist())
    # what is validated on are these images: the same keys, with the archive's labels
    validated = [setup.validation.dataset.source.sample(int(i)).key for i in setup.validation.rows]
    keys = open_archive(archive).keys
    assert sorted(validated) == sorted(keys[int(row)] for row in rows)
    assert sorted(setup.validation.labels[setup.validation.rows].tolist()) == sorted(labels[rows].tolist())


def test_the_choice_depends_on_the_seed_alone(archive: Path):
    opened = open_archive(archive)
    assert np.array_equal(held_out_rows(opened, 0.2, 7), held_out_rows(open_archive(archive), 0.2, 7))
    assert not np.array_equal(held_out_rows(opened, 0.2, 7), held_out_rows(opened, 0.2, 8))


def test_a_run_records_its_share_and_is_resumed_with_it_only(options):
    run = options(val=0.2, epochs=1)
    result = train(run)[0]
    assert result.top1 is not None
    config = tomllib.loads((run.out / "config.toml").read_text())
    assert config["options"]["val"] == "0.2"
    assert config["validation"] == {"images": len(held_out_rows(open_archive(run.archive), 0.2, 0))}
    assert TrainOptions.read(read_config(run.out / "config.toml")).val_share == 0.2
    with pytest.raises(SpecMismatch, match=r"with val = '0\.2', found val = '0\.3'"):
        train(options(val=0.3, epochs=1))


def test_views_that_are_mixed_with_a_held_out_image_are_not_trained_on(options, tmp_path: Path):
    mixed = cache(tmp_path / "mixed.redistill.zarr", recipe="cifar?mixup=0.8", views=2)
    opened = open_archive(mixed)
    held_out = set(held_out_rows(opened, 0.2, 0).tolist())
    feed = prepared(options(archive=mixed, val="0.2", losses=("kl",), epochs=2)).feed
    for epoch in range(2):
        partners = np.asarray(opened.view_params(epoch)["mix_partner"])
        rows = np.concatenate(feed.global_batches(epoch))
        assert len(rows) > 50
        assert not held_out & {*rows.tolist(), *partners[rows].tolist()}


def test_equal_images_are_on_the_same_side(options, tmp_path: Path):
    images = tmp_path / "images"
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (images / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(images / name / f"{i}.png")
            (images / name / f"{i}-copy.png").write_bytes((images / name / f"{i}.png").read_bytes())
    path = cache(tmp_path / "a.redistill.zarr", f"folder:{images}", teacher="demo:tiny?num_classes=2&weights=random")
    opened = open_archive(path)
    rows = held_out_rows(opened, 0.25, 0)
    assert len(rows) == 20
    digests = np.asarray(opened.digests)
    held, kept = ({d.tobytes() for d in digests[chosen]} for chosen in (rows, np.setdiff1d(np.arange(80), rows)))
    assert not held & kept


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "nan"])
def test_a_share_outside_its_limits_is_refused(options, share: str):
    with pytest.raises(UsageError, match=f"must be above 0 and below 1, found {share}"):
        options(val=share)


def test_a_share_that_leaves_no_image_or_has_an_archive_is_refused(options, val_archive: Path):
    with pytest.raises(Refused, match=r"--val 0\.001: this share of a class is less than one image"):
        prepared(options(val="0.001"))
    with pytest.raises(UsageError, match=r"--val 0\.1 holds out training images, for which there is no --val-archive"):
        options(val="0.1", val_archive=val_archive)
