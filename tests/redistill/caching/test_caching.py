"""Stage 1: the archive is what the teacher said, to the byte whatever happened on the way, or a refusal in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redistill_cache
import torch
from redistill_cache.codecs import kl_rows
from redistill_cache.errors import Refused, SpecMismatch, UsageError
from redistill_cache.verify import verify

import redistill
from redistill.caching import CacheOptions, cache_teacher, estimate_cache
from redistill.caching.watcher import Silent
from redistill.devices import pick_device
from redistill.interrupts import Interrupted
from redistill.models import open_model
from redistill.teachers import Teacher
from tests import odd_teachers

DATA = "synthetic?n=90&classes=5"
TEACHER = "demo:small?num_classes=5&weights=random"


def asked(out: Path, **changed) -> CacheOptions:
    plain = {"data": DATA, "teacher": TEACHER, "views": 2, "out": out, "batch_size": 16, "workers": 0, "block_rows": 32}
    return CacheOptions(**(plain | changed))


def manifest(path: Path) -> bytes:
    return (path / "_redistill" / "manifest.json").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "a.redistill.zarr"
    cache_teacher(asked(path))
    return path


def python_teacher(name: str) -> str:
    return f"python:{odd_teachers.__name__}:{name}?num_classes=5&norm=half&size=32"


# -- what is stored ---------------------------------------------------------------------------------------------------


def test_cached_is_online(whole: Path):
    """Every row of every view, rendered again from the archive and asked again."""
    archive = redistill_cache.open_archive(whole, verify="full")
    source, teacher = redistill.open_source(DATA), Teacher(open_model(TEACHER), device=pick_device("cpu"))
    for view in range(2):
        pixels = torch.stack([redistill.render(source, archive, row, view) for row in range(archive.num_samples)])
        online = teacher(pixels)["logits"].numpy()
        stored = archive.logits(view)
        assert max(kl_rows(online, stored, 1.0).max(), kl_rows(online, stored, 4.0).max()) <= 1e-3
        assert stored.std(0).max() > 0, "a teacher that says the same of everything proves nothing"
    assert verify(whole, full=True).ok
    assert archive.class_names == source.class_names


def test_features_and_the_shift_are_kept_when_asked(tmp_path: Path):
    options = asked(tmp_path / "a.zarr", signals=("layer2", "penultimate"), keep_shift=True, codec="float16")
    cache_teacher(options)
    archive = redistill_cache.open_archive(options.out)
    teacher = Teacher(open_model(TEACHER), device=pick_device("cpu"), layers=("layer2", "penultimate"))
    source = redistill.open_source(DATA)
    pixels = torch.stack([redistill.render(source, archive, row, 1) for row in range(20)])
    online = teacher(pixels)
    assert np.allclose(archive.logits(1, range(20)), online["logits"].numpy(), atol=2e-3)
    for layer in options.layers:
        exact, stored = online[layer].numpy(), archive.features(1, range(20), layer=layer)
        relative = np.linalg.norm(stored - exact, axis=1) / np.linalg.norm(exact, axis=1)
        assert relative.max() <= options.feature_fidelity


def test_an_archive_of_few_odd_samples(tmp_path: Path):
    cache_teacher(asked(tmp_path / "a.zarr", data="synthetic?n=3&classes=5", views=1))
    assert redistill_cache.open_archive(tmp_path / "a.zarr").logits(0).shape == (3, 5)


# -- the same to the byte ---------------------------------------------------------------------------------------------


class StopAt(Silent):
    """SIGTERM after so many calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def advance(self, *_) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("calls", [1, 3, 7])
def test_an_interrupted_archive_is_continued_to_the_same_bytes(whole: Path, tmp_path: Path, calls: int):
    path = tmp_path / "a.redistill.zarr"
    with pytest.raises(Interrupted, match="same command") as stop:
        cache_teacher(asked(path), StopAt(calls))
    assert stop.value.exit_code == 143
    with pytest.raises(redistill_cache.errors.Incomplete):
        redistill_cache.open_archive(path)
    cache_teacher(asked(path))
    assert manifest(path) == manifest(whole)


def test_workers_and_ranks_do_not_change_a_byte(whole: Path, tmp_path: Path):
    cache_teacher(asked(tmp_path / "workers.zarr", workers=2))
    assert manifest(tmp_path / "workers.zarr") == manifest(whole)
    arguments = ["--teacher", TEACHER, "--views", "2", "--batch-size", "16", "--workers", "0", "--block-rows", "32"]
    out = tmp_path / "ranks.zarr"
    command = [sys.executable, "-m", "redistill_cli", "cache-teacher", DATA, *arguments, "--out", str(out)]
    ranks = [
        subprocess.Popen(command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1].decode() for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert manifest(out) == manifest(whole)


def test_a_second_run_does_nothing(whole: Path):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    result = cache_teacher(asked(whole))
    assert result.images == 0
    assert result.id == redistill_cache.open_archive(whole).id
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


def test_views_and_teachers_are_added_without_touching_what_is_there(tmp_path: Path):
    path = tmp_path / "a.redistill.zarr"
    first = cache_teacher(asked(path, views=1))
    extended = cache_teacher(asked(path, extend_views=True))
    assert extended.images == 90
    shards = {p: p.read_bytes() for p in path.rglob("c.*")}
    second = cache_teacher(asked(path, teacher="demo:tiny?num_classes=5&weights=random"))
    assert {p: p.read_bytes() for p in shards} == shards
    assert len({first.id, extended.id, second.id}) == 3
    assert set(redistill_cache.open_archive(path).teachers) == {"small", "tiny"}
    # One teacher alone may extend, but the archive is whole only when all have.
    third = cache_teacher(asked(path, views=3, extend_views=True))
    assert third.id is None
    assert third.missing == ("teachers/tiny",)
    whole = cache_teacher(asked(path, views=3, teacher="demo:tiny?num_classes=5&weights=random"))
    assert whole.id is not None


def test_a_second_teacher_interrupted_on_a_sealed_archive_is_continued(tmp_path: Path):
    path = tmp_path / "a.redistill.zarr"
    first = cache_teacher(asked(path))
    other = {"teacher": "demo:tiny?num_classes=5&weights=random"}
    with pytest.raises(Interrupted):
        cache_teacher(asked(path, **other), StopAt(4))
    assert redistill_cache.open_archive(path).id == first.id, "what was sealed stays readable meanwhile"
    assert cache_teacher(asked(path, **other)).id not in (None, first.id)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 32}, "batch_size"),
        ({"fidelity": 1e-2}, "fidelity"),
        ({"codec": "float16"}, "codec"),
        ({"signals": ("logits", "layer2")}, "signals"),
        ({"keep_shift": True}, "keep_shift"),
        ({"amp": True}, "precision"),
        ({"channels_last": False}, "channels_last"),
        ({"teacher": "demo:small?num_classes=5&weights=random&seed=1"}, "weights_digest"),
        ({"teacher": "demo:tiny?num_classes=5&weights=random", "teacher_name": "small"}, "name"),
        ({"views": 3}, "num_views"),
        ({"seed": 1}, "seed"),
        ({"recipe": "center"}, "recipe"),
        ({"size": 24}, "recipe.size"),
        ({"block_rows": 16}, "block_rows"),
        ({"licence": "MIT"}, "licence"),
        ({"data": "synthetic?n=91&classes=5"}, "num_samples"),
        ({"data": "synthetic?n=90&classes=5&seed=3"}, "source.seed"),
    ],
)
def test_another_option_is_refused_by_name_and_changes_nothing(whole: Path, changed: dict, named: str):
    before = manifest(whole)
    with pytest.raises(SpecMismatch) as error:
        cache_teacher(asked(whole, **changed))
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert manifest(whole) == before
    assert verify(whole).ok


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": "synthetic?n=30&classes=6"}, "6 classes"),
        ({"data": "synthetic?n=30&classes=4"}, "4 classes"),
        ({"device": "cuda"}, "--device cpu"),
        ({"teacher": "demo:small?num_classes=5"}, "no weights"),
        ({"teacher": python_teacher("fixed_size"), "size": 40}, "--size 32"),
        ({"teacher": python_teacher("says_nan")}, "NaN"),
        ({"teacher": python_teacher("always_training")}, "train mode"),
        ({"teacher": python_teacher("counts_calls")}, "state"),
        ({"signals": ("logits", "layer9")}, "layer9"),
        ({"extend_views": True}, "--extend-views"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="one of the refusals is that there is no GPU")
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, changed: dict, words: str):
    options = asked(tmp_path / "a.redistill.zarr", **{"allow_python": True, **changed})
    with pytest.raises((Refused, UsageError)) as error:
        cache_teacher(options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_nan_after_the_first_batch_is_named(tmp_path: Path):
    """For about nine of 3,600 views, which the check of the first batch does not see."""
    options = asked(tmp_path / "a.zarr", teacher=python_teacher("rarely_nan"), views=40, allow_python=True)
    with pytest.raises(Refused, match=r"view \d+ of row \d+ \('train/"):
        cache_teacher(options)
    assert not options.out.exists(), "the pilot met one of them, so nothing was begun"


def test_a_full_disk_is_refused_before_anything_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = __import__("shutil").disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("redistill.caching.estimate.shutil.disk_usage", lambda _: usage)
    with pytest.raises(Refused, match="free"):
        cache_teacher(asked(tmp_path / "a.zarr"))


def test_bad_places(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="is a file"):
        cache_teacher(asked(tmp_path / "file"))
    with pytest.raises(UsageError, match="URL"):
        asked(Path("s3://bucket/a.zarr"))


# -- estimates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{}, {"codec": "float16"}, {"fidelity": 1e-5, "signals": ("logits", "layer2")}])
def test_the_estimate_is_within_a_tenth(tmp_path: Path, changed: dict):
    options = replace(asked(tmp_path / "a.zarr", views=6, data="synthetic?n=400&classes=5", **changed), block_rows=None)
    estimate = estimate_cache(options)
    assert not options.out.exists()
    result = cache_teacher(options)
    assert abs(estimate.total_bytes / result.total_bytes - 1) < 0.1, (estimate.total_bytes, result.total_bytes)
    assert abs(estimate.bytes_per_view - result.bytes_per_view) < 0.1 * result.bytes_per_view + 0.5
    assert estimate.blocks == 6
