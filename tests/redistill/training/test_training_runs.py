"""Runs: the files they leave, exact resume, a cohort equals its members, the archive replaces the teacher."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from redistill_cache import open_archive
from redistill_cache.errors import Damaged, Refused, SpecMismatch
from redistill_cache.subsets import choose_rows, plan_subset, write_subset
from safetensors.torch import load_file

from redistill.demo.rewriting import rewrite_logits
from redistill.interrupts import Interrupted
from redistill.models import open_model, open_weights
from redistill.progress import NoProgress
from redistill.training import TrainOptions, train
from redistill.training.loop import Diverged
from redistill.training.options import read_config
from redistill.training.run_files import refuse_foreign_folder
from redistill.views import ViewDataset
from tests.redistill.training.runs import InterruptAt, history, weights
from tests.small_archive import DATA, TEACHER, VAL


def test_a_run_leaves_everything_a_user_needs(options, val_archive: Path):
    run = options(val=VAL, val_archive=val_archive, log=("csv", "tensorboard"), ema=0.9)
    returned = train(run)[0]
    files = {path.name.partition(".out")[0] for path in run.out.iterdir()}
    expected = {"config.toml", "metrics.csv", "last.ckpt", "best.safetensors", "student.safetensors", "result.json"}
    assert expected <= files
    assert any(name.startswith("events") for name in files)
    assert len(history(run.out)) == 3
    result = json.loads((run.out / "result.json").read_text())
    assert result["top1"] == returned.top1 == float(history(run.out)[-1]["val_top1"])
    assert 0 <= result["agreement"] <= 1
    assert result["archive_id"] == returned.archive_id
    plain = open_model("demo:tiny?num_classes=8").module
    plain.load_state_dict(load_file(run.out / "student.safetensors"))
    assert open_weights(run.out / "best.safetensors").num_classes == 8
    assert TrainOptions.read(read_config(run.out / "config.toml")).to_json() == run.to_json()


@pytest.mark.parametrize("step", [1, 5, 7, 14])
def test_a_resumed_run_is_the_same_to_the_bit(options, tmp_path: Path, step: int):
    """Five batches an epoch: interrupted in the middle, at the end, and right after the start of an epoch."""
    straight = options(out=tmp_path / "straight", val=VAL, ema=0.95)
    train(straight)
    broken = options(out=tmp_path / "broken", val=VAL, ema=0.95)
    with pytest.raises(Interrupted) as stop:
        train(broken, InterruptAt(step))
    assert stop.value.exit_code == 130
    assert "same command" in str(stop.value)
    train(broken)
    assert weights(broken.out) == weights(straight.out)
    assert history(broken.out) == history(straight.out)


def test_a_resumed_run_is_one_run_for_wandb(options, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'redistill[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = options(log=("csv", "wandb"))
    with pytest.raises(Interrupted):
        train(run, InterruptAt(7))
    train(run)
    [identity] = {path.name.rpartition("-")[2] for path in (run.out / "wandb").glob("offline-run-*")}
    assert identity == (run.out / "wandb-id.txt").read_text()


def test_workers_do_not_change_a_bit(options, tmp_path: Path):
    train(options(out=tmp_path / "none", epochs=2))
    train(options(out=tmp_path / "two", epochs=2, workers=2))
    assert weights(tmp_path / "none") == weights(tmp_path / "two")


def test_a_cohort_equals_its_members(options, tmp_path: Path):
    losses, seeds = ("power", "kl?weight=0.5+dist?weight=1+ce?weight=1", "ce"), (3, 4)
    train(options(out=tmp_path / "cohort", losses=losses, seeds=seeds, students=("demo:tiny",), val=VAL))
    names = {"power": "power", losses[1]: "kl+dist", "ce": "ce"}
    for loss in losses:
        for seed in seeds:
            alone = tmp_path / f"{names[loss]}-{seed}"
            train(options(out=alone, losses=(loss,), seeds=(seed,), val=VAL))
            member = tmp_path / "cohort" / alone.name
            assert weights(member) == weights(alone)
            assert history(member) == history(alone)


def test_members_with_dropout_do_not_share_a_random_state(options, tmp_path: Path):
    """A member that draws random numbers in its forward pass must not advance the generators of the others."""
    students = ("cifar:resnet8", "python:tests.noisy_student:build?norm=half")
    train(options(out=tmp_path / "cohort", students=students, epochs=1, allow_python=True))
    for student, name in zip(students, ("cifar-resnet8", "python-tests.noisy_student-build"), strict=True):
        train(options(out=tmp_path / name, students=(student,), epochs=1, allow_python=True))
        assert weights(tmp_path / name) == weights(tmp_path / "cohort" / f"{name}-power-0")


@pytest.mark.parametrize(("loss", "term"), [("kl?temperature=1", "kl"), ("power", "power")])
def test_the_archive_replaces_the_teacher(options, tmp_path: Path, loss: str, term: str):
    """An epoch is one batch, so the history is step by step: cached and online teacher give the same loss.

    The certificate is a KL of at most e = 1e-5 for every row, so losses differ by at most 2 sqrt(e * loss), to first
    order: 0.0014 here. That is the worst case; errors of rows are independent, and 150 of them average out.
    """
    plain = {"losses": (loss,), "batch_size": 150, "epochs": 8, "warmup_epochs": 0}
    train(options(out=tmp_path / "cached", **plain))
    train(options(out=tmp_path / "online", online_teacher=TEACHER, **plain))
    cached, online = (
        [float(row[f"train_{term}"]) for row in history(tmp_path / name)] for name in ("cached", "online")
    )
    assert len(cached) == len(online) == 8
    assert cached == pytest.approx(online, abs=2e-4)
    assert max(cached) - min(cached) > 0.02, "the loss changes by much more than that"
    assert cached != online, "the logits were computed in two ways"


def test_a_batch_in_parts_and_several_views_of_an_image(options, tmp_path: Path):
    train(options(out=tmp_path / "parts", grad_accum=3, epochs=1))
    train(options(out=tmp_path / "single", grad_accum=32, epochs=1))
    result = train(options(out=tmp_path / "views", views_per_image=2, epochs=2))[0]
    assert result.epochs == 2
    assert [row["view"] for row in history(tmp_path / "views")] == ["0+1", "2+0"]


def test_rows_above_the_memory_limit_are_in_a_file(options, tmp_path: Path):
    train(options(out=tmp_path / "memory"))
    train(options(out=tmp_path / "file", cache_memory=1e-9))
    assert weights(tmp_path / "memory") == weights(tmp_path / "file")


def test_another_option_is_refused_by_name(options):
    train(options(epochs=1))
    for changed in ({"lr": 0.1}, {"batch_size": 16}, {"losses": ("kl",)}, {"students": ("demo:small",)}, {"ema": 0.9}):
        with pytest.raises(SpecMismatch, match="use the original value to resume") as error:
            train(options(**{"epochs": 1, **changed}))
        assert next(iter(changed)) in str(error.value)


def test_the_device_may_change(options):
    with pytest.raises(Interrupted):
        train(options(device="auto" if not torch.cuda.is_available() else "cuda"), InterruptAt(7))
    assert train(options(device="cpu"))[0].epochs == 3


def test_a_finished_run_is_not_run_again(options):
    first = train(options(epochs=1, val=VAL))[0]
    second = train(options(epochs=1, val=VAL))[0]
    assert (first.top1, first.epochs, first.seconds) == (second.top1, second.epochs, second.seconds)


def test_weights_that_the_last_step_ruined_are_not_saved(options):
    """One batch, one step: the loss before it is finite, and no loss comes after it."""
    ruined = options(batch_size=150, epochs=1, warmup_epochs=0, lr=1e38, weight_decay=1e6, losses=("ce",))
    with pytest.raises(Diverged, match="weights are no longer finite at the end of epoch 1; no checkpoint was saved"):
        train(ruined)
    assert {path.name for path in ruined.out.iterdir()} == {"config.toml"}


@pytest.mark.parametrize("schedule", [{"sched": "constant"}, {"sched": "multistep", "decay_milestones": (1.0, 3.0)}])
def test_a_finished_run_goes_on_to_more_epochs_as_if_they_had_been_planned(options, tmp_path: Path, schedule):
    train(options(out=tmp_path / "straight", epochs=4, val=VAL, **schedule))
    train(options(out=tmp_path / "longer", epochs=2, val=VAL, **schedule))
    result = train(options(out=tmp_path / "longer", epochs=4, val=VAL, **schedule))[0]
    assert result.epochs == 4
    assert weights(tmp_path / "longer") == weights(tmp_path / "straight")
    assert history(tmp_path / "longer") == history(tmp_path / "straight")
    with pytest.raises(SpecMismatch, match="epochs = 4, found epochs = 3"):
        train(options(out=tmp_path / "longer", epochs=3, val=VAL, **schedule))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, "the learning rate of --sched cosine depends on the number of epochs"),
        (
            {"sched": "onecycle", "warmup_epochs": 0.0},
            "the learning rate of --sched onecycle depends on the number of epochs",
        ),
        ({"sched": "constant", "losses": ("kl?decay=linear",)}, "the loss 'kl' changes with the share of the epochs"),
        ({"sched": "constant", "losses": ("taid",)}, "the loss 'taid' changes with the share of the epochs"),
    ],
)
def test_a_run_planned_for_its_end_is_not_continued_beyond_it(options, changed, reason: str):
    train(options(epochs=1, **changed))
    with pytest.raises(SpecMismatch, match=f"a run of 1 epochs that cannot be continued to 2: {reason}") as refusal:
        train(options(epochs=2, **changed))
    assert "\n" not in str(refusal.value)


def foreign_file(out: Path, name: str) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("[options]\nmine = 1\n")


@pytest.mark.parametrize("name", ["config.toml", "report.html", "metrics.csv", "notes/result.json", ".hidden"])
def test_a_folder_with_files_of_others_is_refused_and_not_touched(options, name: str):
    run = options()
    foreign_file(run.out, name)
    with pytest.raises(Refused, match=r"is not a run and holds .*; choose a new folder") as refusal:
        train(run)
    assert name in str(refusal.value)
    assert [path for path in run.out.rglob("*") if path.is_file()] == [run.out / name]
    assert (run.out / name).read_text() == "[options]\nmine = 1\n"


@pytest.mark.parametrize("name", ["config.toml", "last.ckpt", "metrics.csv"])
def test_a_pipe_in_the_folder_is_refused_without_waiting(options, name: str):
    run = options()
    run.out.mkdir()
    os.mkfifo(run.out / name)
    with pytest.raises(Refused, match=r"is not a run|is not a regular file"):
        train(run)


def test_what_a_killed_start_leaves_is_no_obstacle(options):
    """Folders of members, a temporary file, a member whose config.toml is written, a file that a user added later."""
    run = options(losses=("kl", "ce"), epochs=1)
    (run.out / "kl-0").mkdir(parents=True)
    (run.out / "config.toml.0123.partial").write_text("")
    (run.out / "kl-0" / "config.toml.0123.partial").write_text("")
    refuse_foreign_folder(run)
    train(run)
    (run.out / "last.ckpt").unlink()
    foreign_file(run.out, "notes.txt")
    refuse_foreign_folder(run)


def test_an_error_after_the_workers_have_started_stops_them(options, tmp_path: Path, child_processes):
    """Left to the end of the interpreter, each of them would take seconds."""
    damaged = shutil.copytree(options().archive, tmp_path / "damaged.redistill.zarr")
    shard = next(path for path in damaged.glob("teachers/*/logits/*/c.0.0*") if path.stat().st_size > 20)
    shard.chmod(0o644)
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(Damaged) as caught:  # holds the traceback, and with it all frames
        train(options(archive=damaged, workers=2))
    assert "SHA-256" in str(caught.value)
    assert not child_processes()


class Processes(NoProgress):
    """The child processes at the end of every epoch."""

    def __init__(self, child_processes: Callable[[], set[BaseProcess]]) -> None:
        self.child_processes = child_processes
        self.of_epochs: list[set[BaseProcess]] = []

    def epoch(self, *_: object, **__: object) -> None:
        self.of_epochs.append(self.child_processes())


def test_the_workers_of_validation_stay_until_the_end(options, monkeypatch: pytest.MonkeyPatch, child_processes):
    """Two of training and two of validation, where its pixels do not fit in memory; their start takes seconds."""
    monkeypatch.setattr("redistill.training.validate.CACHED_BYTES", 0)
    processes = Processes(child_processes)
    train(options(workers=2, val=VAL), processes)
    assert [len(running) for running in processes.of_epochs] == [4, 4, 4]
    assert len(set.union(*processes.of_epochs)) == 4
    assert not child_processes()


@pytest.mark.slow
def test_an_unfinished_archive_is_refused_and_the_command_ends(options, tmp_path: Path):
    unfinished = shutil.copytree(options().archive, tmp_path / "unfinished.redistill.zarr")
    (unfinished / "_redistill" / "manifest.json").unlink()
    command = ["train", DATA, "--archive", str(unfinished), "--student", "demo:tiny", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "redistill_cli", *command, "--workers", "8"],
        capture_output=True,  # returns when every process has closed the pipe
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 3
    assert "is not finished" in done.stderr.splitlines()[-1]


class RecordedWarnings(NoProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warning(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("views_per_image", [1, 2])
def test_a_teacher_that_is_at_chance_on_the_labels_is_named_once(options, views_per_image: int):
    recorded = RecordedWarnings()
    train(options(views_per_image=views_per_image), recorded)
    (text,) = recorded.texts
    assert re.fullmatch(r"teacher small predicts [\d.]+% of 150 labels in view 0, no more than by chance .*", text)


def test_a_teacher_that_is_often_wrong_but_not_at_chance_is_not(options, archive: Path, tmp_path: Path):
    original = open_archive(archive)

    def some_right(logits: np.ndarray, view: int, rows: np.ndarray) -> np.ndarray:
        changed = logits.copy()
        right = rows[rows % 3 == 0]
        changed[rows % 3 == 0, original.labels[right]] = 20.0
        return changed

    rewrite_logits(original, tmp_path / "third.redistill.zarr", change=some_right)
    recorded = RecordedWarnings()
    train(options(archive=tmp_path / "third.redistill.zarr", epochs=1), recorded)
    assert not recorded.texts


class Told(NoProgress):
    """Keeps the messages of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)


def test_a_subset_trains_on_its_images_of_the_whole_data(options, archive: Path, tmp_path: Path):
    """The data has 150 images; the subset of 40 of them is joined by content, and compared by its canaries."""
    whole = open_archive(archive)
    rows = choose_rows(whole, per_class=5, views=(0, 2))
    write_subset(plan_subset(whole, tmp_path / "subset", (0, 2), rows))
    told = Told()
    result = train(options(archive=tmp_path / "subset", epochs=2), told)[0]
    assert any("40 matched, 110 extra" in line for line in told.lines)
    assert any("canaries are bit-identical" in line for line in told.lines)
    subset = open_archive(tmp_path / "subset")
    assert result.archive_id == subset.id
    dataset = ViewDataset(DATA, subset)
    assert sorted(dataset.indices(1)) == list(range(40, 80))
    of_whole = ViewDataset(DATA, whole)
    for row, old in list(enumerate(rows.tolist()))[::13]:
        assert torch.equal(dataset[dataset.index(1, row)].pixels, of_whole[of_whole.index(2, old)].pixels)
