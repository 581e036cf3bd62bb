"""Options from a TOML file: right types or one line that names the option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from redistill_cache.errors import UsageError

from redistill.optim import preset
from redistill.training import TrainOptions
from redistill.training.options import read_config, to_toml

GIVEN = {"data": "folder:images", "archive": "a.redistill.zarr", "students": ["demo:tiny"], "out": "run"}


def read(tmp_path: Path, **said: object) -> TrainOptions:
    file = tmp_path / "config.toml"
    file.write_text(to_toml({"options": GIVEN | said}))
    return TrainOptions.read(read_config(file))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"batch_size": "64"}, "batch_size must be a whole number, found '64'"),
        ({"batch_size": 64.5}, "batch_size must be a whole number, found 64.5"),
        ({"batch_size": True}, "batch_size must be a whole number, found True"),
        ({"lr": "high"}, "lr must be a number, found 'high'"),
        ({"students": "demo:tiny"}, "students must be a list, each text, found 'demo:tiny'"),
        ({"seeds": ["a"]}, "seeds must be a list, each a whole number, found"),
        ({"decay_milestones": [1, "b"]}, "decay_milestones must be a list, each a number, found"),
        ({"compile": 1}, "compile must be true or false, found 1"),
        ({"archive": 5}, "archive must be a path, found 5"),
        ({"data": 5}, "data must be text, found 5"),
        ({"optim": "adam"}, "unknown option 'optim'"),
        ({"batchsize": 5}, "unknown option 'batchsize'; did you mean batch_size"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, said: dict[str, Any], words: str):
    with pytest.raises(UsageError) as refused:
        read(tmp_path, **said)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_numbers_may_be_whole_and_paths_text(tmp_path: Path):
    found = read(tmp_path, lr=1, seeds=[1, 2], ema=0.5, val_archive="val.redistill.zarr", val="folder:val", amp=False)
    assert found.optim.lr == 1
    assert found.archive == Path("a.redistill.zarr")
    assert (found.seeds, found.ema, found.amp) == ((1, 2), 0.5, False)


def test_a_preset_survives_the_file(tmp_path: Path):
    config = preset("cifar-kd", model="ShuffleV2").optim
    assert (
        read(tmp_path, **{name: value for name, value in config.to_json().items() if value is not None}).optim == config
    )
