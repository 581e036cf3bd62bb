"""A small archive of a real teacher, written by stage 1, and options of short runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from redistill.optim import OptimConfig
from redistill.training import TrainOptions
from tests.small_archive import DATA, VAL, cache


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("archive") / "teacher.redistill.zarr")


@pytest.fixture(scope="session")
def val_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cache(tmp_path_factory.mktemp("archive") / "val.redistill.zarr", VAL, views=1, recipe="center")


@pytest.fixture
def options(archive: Path, tmp_path: Path):
    """options(**changed) -> TrainOptions of a run of a few seconds."""

    def make(**changed) -> TrainOptions:
        optim = {"lr": 0.05, "epochs": 3, "warmup_epochs": 0.5}
        optim |= {name: changed.pop(name) for name in list(changed) if name in OptimConfig.__dataclass_fields__}
        defaults = {
            "data": DATA,
            "archive": archive,
            "students": ("demo:tiny",),
            "out": tmp_path / "run",
            "batch_size": 32,
            "workers": 0,
            "log": ("csv",),
        }
        return TrainOptions(**(defaults | changed), optim=OptimConfig(**optim))

    return make
