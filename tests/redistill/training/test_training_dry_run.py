"""`train --dry-run`: what it says is what the run does, and it writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from redistill_cache.errors import Refused

from redistill.training import dry_run, train
from redistill.training.loop import Diverged
from tests.redistill.training.runs import history
from tests.small_archive import VAL


def test_it_writes_nothing_and_says_what_the_run_then_does(options, tmp_path: Path):
    run = options(val=VAL, losses=("power", "kl"), epochs=2, opt="adamw", ema=0.9)
    needs = dry_run(run)
    assert list(tmp_path.iterdir()) == []
    assert (needs.steps_per_epoch, needs.steps, needs.images, needs.validation_images) == (5, 10, 150, 64)
    assert not needs.resumes
    assert needs.step_seconds > 0
    assert needs.peak_memory_bytes > 2**20
    assert needs.teacher_rows_bytes > 150 * 8
    results = train(run)
    assert dict(needs.parameters) == {result.run: result.parameters for result in results}
    written = sum(path.stat().st_size for path in run.out.rglob("*") if path.suffix in (".ckpt", ".safetensors"))
    # two checkpoints remain of the three that exist while one is written; files have headers besides tensors
    assert needs.disk_bytes / 2 < written < needs.disk_bytes * 1.5
    assert needs.disk_bytes < needs.free_bytes
    assert dry_run(run).resumes
    with pytest.raises(Refused, match="holds a run; choose another --out"):
        dry_run(options(val=VAL, resume="never"))


def test_its_loss_is_that_of_the_first_batch(options):
    needs = dry_run(options(batch_size=150, epochs=1, losses=("kl",)))
    run = options(batch_size=150, epochs=1, losses=("kl",))
    train(run)
    assert needs.losses["kl-0"] == pytest.approx(float(history(run.out)[0]["train_loss"]), rel=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_ends_with_workers_and_with_rows_in_a_file(options, workers: int):
    needs = dry_run(options(workers=workers, cache_memory=1e-9, val="0.2"))
    assert needs.teacher_rows_on_disk
    assert needs.images + needs.validation_images == 150


def test_a_step_that_ruins_the_weights_is_refused_as_in_training(options, tmp_path: Path):
    with pytest.raises(Diverged, match="no longer finite at epoch 1, batch 1"):
        dry_run(options(batch_size=150, epochs=1, warmup_epochs=0, lr=1e38, weight_decay=1e6, losses=("ce",)))
    assert list(tmp_path.iterdir()) == []
