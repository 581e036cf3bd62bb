"""Signals added to a teacher of a finished archive: over the same views, without changing what is there."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redistill_cache
import torch
from redistill_cache.errors import Incomplete, RedistillError
from redistill_cache.spec import SignalSpec, TeacherSpec
from redistill_cache.verify import verify
from redistill_cache.writer import ArchiveWriter

from redistill.caching import CacheOptions, cache_teacher, estimate_cache
from redistill.caching.additions import missing_signal, typed_model
from redistill.caching.pilot import pilot_indices, stack_pixels
from redistill.caching.plan import make_plan
from redistill.interrupts import Interrupted
from redistill.models import open_model
from redistill.progress import NoProgress
from redistill.ranks import Rank
from redistill.teachers import Teacher
from redistill.views import ViewDataset
from tests.stage1 import FIVE_CLASSES, SignalAtBatch, command_line, file_hashes, five_class_options, start_command

MANIFEST = "_redistill/manifest.json"
ADDED = ("layer2", "penultimate")


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "redistill_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def added(path: Path, **changes: object) -> CacheOptions:
    """The options that add to the archive; views and seed are those of the archive."""
    return five_class_options(path, **({"signals": ADDED, "views": None, "block_rows": None} | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "a.zarr"
    cache_teacher(five_class_options(path, seed=3))
    return path


@pytest.fixture(scope="module")
def extended(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With signals added."""
    path = tmp_path_factory.mktemp("extended") / "a.zarr"
    shutil.copytree(finished, path)
    cache_teacher(added(path))
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "a.zarr"))


class Told(NoProgress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)


def test_signals_are_added_and_nothing_else_changes(finished: Path, extended: Path):
    before, after = file_hashes(finished), file_hashes(extended)
    assert {name for name, digest in before.items() if after.get(name) != digest} == {MANIFEST}
    assert len({name.split("/")[1] for name in after.keys() - before.keys() if name.startswith("teachers/")}) == 1
    archive = redistill_cache.open_archive(extended, verify="full")
    assert list(archive.teachers) == ["small"]
    assert archive.signals_of() == ("logits", *ADDED)
    teacher = Teacher(open_model(FIVE_CLASSES["teacher"]), device=torch.device("cpu"), layers=ADDED)
    for view in range(2):
        dataset = ViewDataset(FIVE_CLASSES["data"], archive)
        pixels = stack_pixels(dataset.__getitems__([dataset.index(view, row) for row in range(90)]))
        signals = teacher(pixels)
        for layer in ADDED:
            exact = signals[layer].numpy().astype(np.float64)
            mean = archive.codec("small", layer).side()["offset"]
            distance = np.linalg.norm(exact - mean, axis=1)
            error = np.linalg.norm(archive.features(view, layer=layer) - exact, axis=1)
            assert (error <= 0.101 * np.maximum(distance, archive.codec("small", layer).config()["floor"])).all()
            assert error.max() > 0
    assert verify(extended, full=True).ok


def test_what_is_there_already_is_said_and_not_computed(extended: Path):
    before, told = file_hashes(extended), Told()
    result = cache_teacher(added(extended), told)
    assert result.images == 0
    assert result.signals == ("logits", *ADDED)
    assert f"{extended} has layer2, penultimate of teacher small already" in told.lines
    cache_teacher(added(extended, signals=("penultimate",)))
    cache_teacher(added(extended, signals=("logits", "layer2")))
    assert file_hashes(extended) == before


@pytest.mark.slow
def test_one_at_a_time(copy: Path):
    cache_teacher(added(copy, signals=("layer2",)))
    cache_teacher(added(copy, signals=("logits", "layer2", "layer3")))
    archive = redistill_cache.open_archive(copy)
    assert set(archive.signals_of()) == {"logits", "layer2", "layer3"}
    assert archive.views_of("small", "layer3") == archive.views_of("small", "layer2") == 2


@pytest.mark.parametrize("batches", [1, 11])
def test_an_interrupted_addition_resumes_to_the_same_bytes(copy: Path, extended: Path, batches: int):
    identity = redistill_cache.open_archive(copy).id
    with pytest.raises(Interrupted):
        cache_teacher(added(copy), SignalAtBatch(signal.SIGTERM, batches))
    archive = redistill_cache.open_archive(copy)
    assert (archive.id, archive.signals_of()) == (identity, ("logits",))
    assert verify(copy).ok
    cache_teacher(added(copy))
    assert file_hashes(copy) == file_hashes(extended)


def arguments(path: Path) -> list[str]:
    options = {"signals": ",".join(ADDED), "workers": 0, **FIVE_CLASSES}
    line = command_line(path, **options)
    for option in ("--views", "--block-rows"):
        at = line.index(option)
        del line[at : at + 2]
    return line


@pytest.mark.slow
def test_a_killed_addition_resumes_to_the_same_bytes(copy: Path, extended: Path, tmp_path: Path):
    process = start_command(arguments(copy), tmp_path / "out.txt")
    deadline = time.monotonic() + 240
    while not list((copy / "_redistill/blocks").glob("teachers.small--*.0.0.json")):
        assert time.monotonic() < deadline, (tmp_path / "out.txt").read_text()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join(240)
    assert redistill_cache.open_archive(copy).logits(1).shape == (90, 5)
    cache_teacher(added(copy))
    assert file_hashes(copy) == file_hashes(extended)


@pytest.mark.slow
def test_ranks_do_not_change_a_byte(copy: Path, extended: Path, tmp_path: Path):
    outputs = [tmp_path / f"{rank}.txt" for rank in range(3)]
    ranks = [start_command(arguments(copy), outputs[rank], RANK=str(rank), WORLD_SIZE="3") for rank in range(3)]
    for rank in ranks:
        rank.join(240)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0], [output.read_text() for output in outputs]
    assert file_hashes(copy) == file_hashes(extended)


def test_views_are_extended_in_all_parts(finished: Path, copy: Path, tmp_path: Path):
    alone = Path(shutil.copytree(finished, tmp_path / "alone.zarr"))
    cache_teacher(five_class_options(alone, seed=None, views=3, extend_views=True))
    # Other settings than the logits have: those of a part are continued.
    cache_teacher(added(copy, batch_size=20, feature_fidelity=0.2))
    cache_teacher(added(copy, signals=("logits",), views=3, extend_views=True))
    archive = redistill_cache.open_archive(copy)
    assert [archive.views_of("small", name) for name in ("logits", *ADDED)] == [3, 3, 3]
    assert np.isfinite(archive.features(2, layer="layer2")).all()
    assert archive.codec("small", "layer2").config()["fidelity"] == 0.2
    assert verify(copy, full=True).ok
    # The network also computes the added layers, which must not change a byte of the logits.
    expected, found = file_hashes(alone), file_hashes(copy)
    assert {name for name, digest in expected.items() if found[name] != digest} == {MANIFEST}


@pytest.mark.slow
def test_an_interrupted_extension_of_all_parts_is_finished_by_the_same_command(copy: Path):
    cache_teacher(added(copy))
    with pytest.raises(Interrupted):
        cache_teacher(added(copy, signals=("logits",), views=3, extend_views=True), SignalAtBatch(signal.SIGTERM, 8))
    archive = redistill_cache.open_archive(copy)
    assert (archive.views_of("small"), archive.views_of("small", "layer2")) == (3, 2)
    cache_teacher(added(copy, signals=("logits",), views=3, extend_views=True))
    assert redistill_cache.open_archive(copy).views_of("small", "layer2") == 3


def test_a_new_teacher_has_exactly_the_signals_of_the_list(tmp_path: Path):
    result = cache_teacher(five_class_options(tmp_path / "f.zarr", signals=("penultimate",)))
    assert result.signals == ("penultimate",)
    assert result.teacher_top1 is not None, "the accuracy is measured all the same"
    archive = redistill_cache.open_archive(tmp_path / "f.zarr")
    assert archive.signals_of() == ("penultimate",)
    with pytest.raises(RedistillError, match="has no signal 'logits'; signals: penultimate"):
        archive.logits(0)
    cache_teacher(added(tmp_path / "f.zarr", signals=("logits",)))
    assert redistill_cache.open_archive(tmp_path / "f.zarr").logits(1).shape == (90, 5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"teacher": "demo:small?num_classes=5&weights=random&seed=1"}, "weights_digest"),
        ({"teacher": "demo:tiny?num_classes=5&weights=random", "teacher_name": "small"}, "name = 'small', now it is"),
        ({"teacher": "demo:tiny?num_classes=5&weights=random"}, "is another one; add --teacher-name tiny"),
        ({"recipe": "center"}, "--recipe"),
        ({"size": 24}, "--recipe and --size"),
        ({"seed": 4}, "seed = 3, now it is 4"),
        ({"views": 3}, "num_views = 2, now it is 3; use extend_views"),
        ({"data": "synthetic?n=91&classes=5"}, "num_samples"),
        ({"signals": ("layer9",)}, "the network has no layer 'layer9'"),
        ({"signals": ("logits", "layer2"), "fidelity": 1e-2}, "fidelity = 0.001, now it is 0.01"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(copy: Path, changes: dict, reason: str):
    before = file_hashes(copy)
    with pytest.raises(RedistillError) as error:
        cache_teacher(added(copy, **changes))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert file_hashes(copy) == before


def test_another_bound_for_what_was_added_is_refused(extended: Path):
    with pytest.raises(RedistillError, match=r"feature_fidelity = 0\.1, now it is 0\.2"):
        cache_teacher(added(extended, feature_fidelity=0.2))
    # Logits do not depend on it.
    assert cache_teacher(added(extended, signals=("logits",), feature_fidelity=0.2)).images == 0


def test_nothing_is_added_to_a_teacher_that_is_not_finished(tmp_path: Path):
    with pytest.raises(Interrupted):
        cache_teacher(five_class_options(tmp_path / "a.zarr"), SignalAtBatch(signal.SIGTERM, 3))
    with pytest.raises(Incomplete, match="'small' is not finished, so nothing can be added to it"):
        cache_teacher(added(tmp_path / "a.zarr"))


def test_a_refusal_names_the_command_that_adds_what_is_missing(copy: Path):
    error = missing_signal(redistill_cache.open_archive(copy), "small", "layer3")
    assert error.exit_code == 3
    text = str(error)
    assert text.startswith(
        "archive has no 'layer3' of teacher 'small' (it has logits); add it: redistill cache-teacher "
    )
    command = shlex.split(text.partition("add it: redistill ")[2].replace("DATA", FIVE_CLASSES["data"], 1))
    result = run_cli(*command, "--workers", "0")
    assert result.returncode == 0, result.stderr
    assert "logits, layer3" in result.stdout
    assert redistill_cache.open_archive(copy).signals_of() == ("logits", "layer3")


@pytest.mark.parametrize(
    ("spec", "source", "typed"),
    [
        (
            "torchvision:resnet50",
            "torchvision:ResNet50_Weights.IMAGENET1K_V2",
            "torchvision:resnet50?weights=IMAGENET1K_V2",
        ),
        (
            "timm:vit_base_patch16_224",
            "timm:vit_base_patch16_224.augreg_in1k",
            "timm:vit_base_patch16_224?weights=augreg_in1k",
        ),
        ("demo:large?num_classes=10", "file", "demo:large?num_classes=10&weights=FILE"),
        ("demo:large?num_classes=10", "random", "demo:large?num_classes=10&weights=random"),
        ("python:my.nets:net", "python", "python:my.nets:net"),
        (None, None, "MODEL"),
    ],
)
def test_the_teacher_of_an_archive_as_it_is_typed(spec: str | None, source: str | None, typed: str):
    model = {} if spec is None else {"spec": spec, "weights_source": source}
    signal = SignalSpec("logits", "float32", 10)
    assert typed_model(TeacherSpec("net", (signal,), model)) == typed


def test_the_estimate_is_of_what_is_added(copy: Path):
    whole = estimate_cache(five_class_options(copy.parent / "new.zarr"))
    estimate = estimate_cache(added(copy))
    assert list(estimate.codecs) == list(ADDED)
    assert estimate.view_bytes == 0 < whole.view_bytes


def test_features_are_fitted_to_more_rows_than_logits(tmp_path: Path):
    """A basis fitted to fewer rows than twice the width misses directions, and the rows are then stored exactly."""
    options = five_class_options(tmp_path / "a.zarr", data="synthetic?n=2500&classes=5&size=16")
    rows = {
        signals: len(pilot_indices(make_plan(replace(options, signals=signals), Rank())))
        for signals in (("logits",), ("logits", "penultimate"), ("penultimate",))
    }
    assert rows == {("logits",): 512, ("logits", "penultimate"): 4096, ("penultimate",): 4096}


def test_removing_the_teacher_removes_what_was_added(copy: Path):
    cache_teacher(added(copy))
    result = run_cli("archive", "remove-teacher", str(copy), "small", "--yes")
    assert result.returncode == 0, result.stderr
    assert "removed teacher small with the signals added to it (layer2, penultimate)" in result.stdout
    assert not ArchiveWriter.resume(copy).teachers
    assert not list((copy / "teachers").glob("small*"))
