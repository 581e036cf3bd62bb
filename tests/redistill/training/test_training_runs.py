"""Runs: what they leave, that they go on bit for bit, that a cohort is its members, that the archive is the teacher."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pytest
from redistill_cache.errors import SpecMismatch
from safetensors.torch import load_file

from redistill.interrupts import Interrupted
from redistill.models import open_model, open_weights
from redistill.progress import NoProgress
from redistill.training import TrainOptions, train
from redistill.training.loop import Diverged
from redistill.training.options import read_config
from tests.small_archive import TEACHER, VAL


class StopAt(NoProgress):
    """Press Ctrl-C at a step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self, task: str, *_: object, **__: object) -> None:
        self.left -= task == "train"
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for timing in ("seconds", "images_per_second", "data_wait"):
            del row[timing]
    return rows


def test_a_run_leaves_everything_a_user_needs(options, val_archive: Path):
    asked = options(val=VAL, val_archive=val_archive, log=("csv", "tensorboard"), ema=0.9)
    outcome = train(asked)[0]
    found = {path.name.partition(".out")[0] for path in asked.out.iterdir()}
    kept = {"config.toml", "metrics.csv", "last.ckpt", "best.safetensors", "student.safetensors", "result.json"}
    assert kept <= found
    assert any(name.startswith("events") for name in found)
    assert len(history(asked.out)) == 3
    result = json.loads((asked.out / "result.json").read_text())
    assert result["top1"] == outcome.top1 == float(history(asked.out)[-1]["val_top1"])
    assert 0 <= result["agreement"] <= 1
    assert result["archive_id"] == outcome.archive_id
    plain = open_model("demo:tiny?num_classes=8").module
    plain.load_state_dict(load_file(asked.out / "student.safetensors"))
    opened = open_weights(asked.out / "best.safetensors")
    assert opened.num_classes == 8
    again = TrainOptions.read(read_config(asked.out / "config.toml"))
    assert again.to_json() == asked.to_json()


@pytest.mark.parametrize("step", [1, 5, 7, 14])
def test_going_on_is_bit_for_bit(options, tmp_path: Path, step: int):
    """Five batches an epoch: stops in the middle, at the end, and right after the start of an epoch."""
    straight = options(out=tmp_path / "straight", val=VAL, ema=0.95)
    train(straight)
    broken = options(out=tmp_path / "broken", val=VAL, ema=0.95)
    with pytest.raises(Interrupted) as stop:
        train(broken, StopAt(step))
    assert stop.value.exit_code == 130
    assert "same command" in str(stop.value)
    train(broken)
    assert weights(broken.out) == weights(straight.out)
    assert history(broken.out) == history(straight.out)


def test_a_run_that_goes_on_is_one_run_for_wandb(options, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'redistill[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    asked = options(log=("csv", "wandb"))
    with pytest.raises(Interrupted):
        train(asked, StopAt(7))
    train(asked)
    [identity] = {path.name.rpartition("-")[2] for path in (asked.out / "wandb").glob("offline-run-*")}
    assert identity == (asked.out / "wandb-id.txt").read_text()


def test_workers_do_not_change_a_bit(options, tmp_path: Path):
    train(options(out=tmp_path / "none", epochs=2))
    train(options(out=tmp_path / "two", epochs=2, workers=2))
    assert weights(tmp_path / "none") == weights(tmp_path / "two")


def test_a_cohort_is_its_members(options, tmp_path: Path):
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


def test_members_with_dropout_do_not_share_noise(options, tmp_path: Path):
    """A member that draws random numbers in its forward pass must not move the others' generators."""
    students = ("cifar:resnet8", "python:tests.noisy_student:build?norm=half")
    cohort = options(out=tmp_path / "cohort", students=students, epochs=1, allow_python=True)
    train(cohort)
    for student, name in zip(students, ("cifar-resnet8", "python-tests.noisy_student-build"), strict=True):
        alone = options(out=tmp_path / name, students=(student,), epochs=1, allow_python=True)
        train(alone)
        assert weights(tmp_path / name) == weights(tmp_path / "cohort" / f"{name}-power-0")


@pytest.mark.parametrize(("loss", "term"), [("kl?temperature=1", "kl"), ("power", "power")])
def test_the_archive_stands_for_the_teacher(options, tmp_path: Path, loss: str, term: str):
    """Step by step, since an epoch is one batch: with the cached and with the online teacher the loss is the same.

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
    assert max(cached) - min(cached) > 0.02, "the loss moves by much more than that"
    assert cached != online, "two ways to the same answers, and not one"


def test_parts_of_a_batch_and_several_views_of_an_image(options, tmp_path: Path):
    train(options(out=tmp_path / "parts", grad_accum=3, epochs=1))
    train(options(out=tmp_path / "single", grad_accum=32, epochs=1))
    outcome = train(options(out=tmp_path / "views", views_per_image=2, epochs=2))[0]
    assert outcome.epochs == 2
    assert [row["view"] for row in history(tmp_path / "views")] == ["0+1", "2+0"]


def test_rows_beyond_the_memory_lie_in_a_file(options, tmp_path: Path):
    train(options(out=tmp_path / "memory"))
    train(options(out=tmp_path / "file", cache_memory=1e-9))
    assert weights(tmp_path / "memory") == weights(tmp_path / "file")


def test_another_option_is_refused_by_name(options):
    train(options(epochs=1))
    for changed in ({"lr": 0.1}, {"batch_size": 16}, {"losses": ("kl",)}, {"students": ("demo:small",)}, {"ema": 0.9}):
        with pytest.raises(SpecMismatch) as error:
            train(options(**{"epochs": 1, **changed}))
        assert next(iter(changed)) in str(error.value)


def test_a_finished_run_is_not_run_again(options):
    first = train(options(epochs=1, val=VAL))[0]
    second = train(options(epochs=1, val=VAL))[0]
    assert (first.top1, first.epochs, first.seconds) == (second.top1, second.epochs, second.seconds)


def test_weights_that_the_last_step_ruined_are_not_kept(options):
    """One batch, one step: the loss before it is fine, and no loss comes after it."""
    ruined = options(batch_size=150, epochs=1, warmup_epochs=0, lr=1e38, weight_decay=1e6, losses=("ce",))
    with pytest.raises(
        Diverged, match="weights are no longer finite at the end of epoch 1; no checkpoint was made yet"
    ):
        train(ruined)
    assert {path.name for path in ruined.out.iterdir()} == {"config.toml"}
