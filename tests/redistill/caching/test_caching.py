"""Stage 1: the archive is what the teacher said, to the byte whatever happened on the way, or a refusal in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redistill_cache
import torch
from PIL import Image
from redistill_cache.codecs import kl_rows
from redistill_cache.errors import Refused, SpecMismatch, UsageError
from redistill_cache.verify import verify

import redistill
from redistill.caching import CacheOptions, cache_teacher, estimate_cache
from redistill.caching.run import ENOUGH_LABELS
from redistill.demo.run import DIFFICULTY, TEACHER_NETWORK, TEACHER_WEIGHTS
from redistill.devices import pick_device
from redistill.interrupts import Interrupted
from redistill.models import open_model
from redistill.progress import NoProgress
from redistill.ranks import Rank
from redistill.teachers import Teacher
from tests import odd_teachers
from tests.stage1 import OTHER_TEACHER, command, started

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


class StopAt(NoProgress):
    """SIGTERM after so many calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def advance(self, task: str, *_: object, **__: object) -> None:
        self.left -= task == "teacher"
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
    out, plain = tmp_path / "ranks.zarr", {"data": DATA, "teacher": TEACHER, "batch_size": 16, "codec": "auto"}
    said = [tmp_path / f"{rank}.txt" for rank in range(2)]
    ranks = [started(command(out, **plain), said[rank], RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0], [text.read_text() for text in said]
    assert said[1].read_text() == "", "the first rank speaks for all"
    assert manifest(out) == manifest(whole)


class AnotherIsFaster(NoProgress):
    """After our first batch another process has committed view 0, and was not yet in time to name its files."""

    def __init__(self, path: Path, finished: Path) -> None:
        self.path, self.finished = path, finished

    def advance(self, task: str, *_: object, **__: object) -> None:
        if task != "teacher":
            return
        for record in (self.finished / "_redistill" / "blocks").glob("*.0.?.json"):
            if (self.path / "_redistill" / "blocks" / record.name).exists():
                continue
            for name, _, sha256 in json.loads(record.read_text())["files"]:
                shutil.copy(self.finished / name, self.path / f"{name}.{sha256}.partial")
            shutil.copy(record, self.path / "_redistill" / "blocks")


def test_a_process_that_is_overtaken_goes_on(whole: Path, tmp_path: Path):
    path = tmp_path / "a.redistill.zarr"
    result = cache_teacher(asked(path), AnotherIsFaster(path, whole))
    assert manifest(path) == manifest(whole)
    assert result.images == 90, "the second view is its own, the first is not"


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
        ({"feature_fidelity": 0.1}, "feature_fidelity"),
        ({"compile": True}, "compile"),
        ({"citation": "me"}, "citation"),
        ({"views": 3, "extend_views": True, "seed": 1}, "seed"),
        ({"views": 3, "extend_views": True, "batch_size": 32}, "batch_size"),
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
        ({"teacher": python_teacher("says_nan"), "amp": True}, "try --no-amp"),
        ({"teacher": python_teacher("moody")}, "over the same images give different logits"),
        ({"teacher": python_teacher("gregarious")}, "depend on the other images of the batch"),
        ({"teacher": python_teacher("greedy")}, "ran out of memory on a batch of 16; try --batch-size 8"),
        ({"teacher": python_teacher("moody"), "allow_python": False}, "command line only"),
        ({"recipe": "center?size=32", "size": 32}, "both say how large views are"),
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
    assert not options.out.exists()


def test_nan_after_the_first_batch_is_named(tmp_path: Path):
    """For about nine of 3,600 views, which the check of the first batch does not see."""
    options = asked(tmp_path / "a.zarr", teacher=python_teacher("rarely_nan"), views=40, allow_python=True)
    with pytest.raises(Refused, match=r"view \d+ of row \d+ \('train/"):
        cache_teacher(options)
    assert not options.out.exists(), "the pilot met one of them, so nothing was begun"


def test_nan_that_no_check_has_seen_is_named_and_costs_one_block(tmp_path: Path):
    more = {"data": "synthetic?n=400&classes=5", "teacher": python_teacher("tired"), "allow_python": True}
    options = asked(tmp_path / "a.zarr", **more)
    with pytest.raises(Refused, match=r"NaN or infinity for view \d of row \d+ \('train/"):
        cache_teacher(options)
    partial = redistill_cache.open_archive(options.out, allow_partial=True)
    rows = partial.rows_available(0)
    assert 0 < len(rows) < 400
    assert np.isfinite(partial.logits(0, rows)).all()


def test_images_that_changed_are_refused(tmp_path: Path):
    def paint(i: int, seed: int) -> None:
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)

    for i in range(6):
        paint(i, i)
    data, teacher = f"folder:{tmp_path / 'images'}", "demo:tiny?num_classes=2&weights=random"
    options = asked(tmp_path / "a.zarr", data=data, teacher=teacher, views=1)
    cache_teacher(options)
    before = manifest(options.out)
    paint(1, 99)
    for changed in (options, replace(options, views=2, extend_views=True)):
        with pytest.raises(SpecMismatch, match="the sample index was written before and differs"):
            cache_teacher(changed)
    paint(6, 6)
    with pytest.raises(SpecMismatch, match="num_samples = 6, now it is 7"):
        cache_teacher(options)
    assert manifest(options.out) == before


class Heard(NoProgress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def test_a_teacher_that_guesses_is_warned_of(tmp_path: Path):
    trained = f"synthetic?{DIFFICULTY}&n={ENOUGH_LABELS}"
    for teacher, warnings in ((f"{TEACHER_NETWORK}&weights={TEACHER_WEIGHTS}", 0), (OTHER_TEACHER, 1)):
        heard = Heard()
        options = asked(tmp_path / f"{warnings}.zarr", data=trained, teacher=teacher, views=1, batch_size=64)
        cache_teacher(options, heard)
        assert len(heard.warnings) == warnings
        assert all("chance is 10.0%" in text for text in heard.warnings)


@pytest.mark.parametrize("rank", ["one", "2", "-1"])
def test_ranks_that_make_no_sense(monkeypatch: pytest.MonkeyPatch, rank: str):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK"):
        Rank.from_environment()


def test_a_full_disk_is_refused_before_anything_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = __import__("shutil").disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("redistill.caching.estimate.shutil.disk_usage", lambda _: usage)
    with pytest.raises(Refused, match="free"):
        cache_teacher(asked(tmp_path / "a.zarr"))


def test_bad_places(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="is a file"):
        cache_teacher(asked(tmp_path / "file"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(Refused, match="holds files that are no archive"):
        cache_teacher(asked(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with pytest.raises(UsageError, match="URL"):
        asked(Path("s3://bucket/a.zarr"))


@pytest.mark.parametrize(
    "option", [{"views": 0}, {"block_rows": 0}, {"size": 0}, {"workers": -1}, {"codec": "zip"}, {"fidelity": 2.0}]
)
def test_options_that_make_no_sense(tmp_path: Path, option: dict):
    with pytest.raises(UsageError, match="|".join(option)):
        asked(tmp_path / "a.zarr", **option)


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
