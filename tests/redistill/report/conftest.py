"""Finished runs of two losses and two seeds, with their archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from redistill.demo.run import accuracies
from redistill.optim import OptimConfig
from redistill.training import TrainOptions, train
from tests.small_archive import DATA, VAL, cache


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("archive") / "a.redistill.zarr")


@pytest.fixture(scope="session")
def cohort(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs ce-0, ce-1, power-0 and power-1."""
    options = TrainOptions(
        data=DATA,
        archive=archive,
        students=("demo:tiny",),
        out=tmp_path_factory.mktemp("cohort") / "runs",
        losses=("ce", "power"),
        seeds=(0, 1),
        optim=OptimConfig(epochs=2, lr=0.05),
        val=VAL,
        workers=0,
        log=("csv",),
    )
    by_loss = accuracies(train(options))
    assert {name: accuracy.n for name, accuracy in by_loss.items()} == {"ce": 2, "power": 2}
    return options.out
