"""Options of `train` from a config.toml: the right types or one line that names the option; members and their names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from redistill_cache.errors import UsageError

from redistill.optim import preset
from redistill.option_fields import options_of
from redistill.training import TrainOptions
from redistill.training.options import POWER, read_config, write_config

REQUIRED = {"data": "folder:images", "archive": "a.redistill.zarr", "students": ["demo:tiny"], "out": "run"}

# As an earlier version wrote it: arrays in one line.
EARLIER = """[options]
data = "synthetic?n=500"
archive = "full.redistill.zarr"
students = ["demo:small"]
out = "whole/kl-3"
losses = ["kl+ce?weight=0.3"]
seeds = [3]
batch_size = 128
views_per_image = 1
teachers = []
order_seed = 0
ema = 0.99
cache_memory = 4.0
log = ["csv", "tensorboard"]
opt = "nesterov"
lr = 0.1
epochs = 120
warmup_epochs = 0.0
decay_milestones = []

[archive]
id = "c51f"
samples = 500
"""


def read(tmp_path: Path, **options: object) -> TrainOptions:
    file = tmp_path / "config.toml"
    file.write_text(tomli_w.dumps({"options": REQUIRED | options}))
    return TrainOptions.read(read_config(file))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "64"}, "batch_size must be an integer, found '64'"),
        ({"batch_size": 64.5}, "batch_size must be an integer, found 64.5"),
        ({"batch_size": True}, "batch_size must be an integer, found True"),
        ({"batch_size": [64]}, "batch_size must be an integer, found [64]"),
        ({"lr": "high"}, "lr must be a number, found 'high'"),
        ({"lr": True}, "lr must be a number, found True"),
        ({"opt": 3}, "opt must be text, found 3"),
        ({"students": "demo:tiny"}, "students must be a list, each text, found 'demo:tiny'"),
        ({"seeds": ["a"]}, "seeds must be a list, each an integer, found"),
        ({"log": ["csv", 3]}, "log must be a list, each text, found"),
        ({"decay_milestones": [1, "b"]}, "decay_milestones must be a list, each a number, found"),
        ({"compile": 1}, "compile must be true or false, found 1"),
        ({"archive": 5}, "archive must be a path, found 5"),
        ({"data": 5}, "data must be text, found 5"),
        ({"optim": "adam"}, "unknown option 'optim'"),
        ({"batchsize": 5}, "unknown option 'batchsize'; did you mean batch_size"),
        ({"resume": "always"}, "--resume 'always' is not known"),
        ({"log": ["csv", "paper"]}, "--log 'paper' is not known"),
        ({"seeds": [0, -1]}, "--seed must be at least 0 and at most 9223372036854775807, found -1"),
        ({"ema": 1.0}, "--ema must be above 0 and below 1, found 1.0"),
        ({"epochs": 10**18}, "--epochs must be at least 1 and at most 1000000, found 1000000000000000000"),
        ({"seeds": list(range(5000))}, "--seed takes at most 1,000 values, found 5,000"),
        ({"seeds": list(range(600)), "losses": ["kl", "ce"]}, "a run trains at most 1,000 students, found 1,200"),
        ({"losses": ["+".join(["ce"] * 50)]}, "--loss takes at most 32 terms"),
        ({"x" * 100_000: 1}, "unknown option 'xxx"),
        ({"opt": "x" * 100_000}, "--opt 'xxx"),
        ({"batch_size": "x" * 100_000}, "batch_size must be an integer, found 'xxx"),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(UsageError) as refusal:
        read(tmp_path, **options)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_every_integer_has_a_largest_value():
    for option in options_of(TrainOptions).values():
        assert option.type.kind is not int or option.at_most is not None, option.field


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"losses": ["kl", "ce"]}, "losses = ['kl+ce?weight=0.5', 'ce']"),
        ({}, f"losses = ['{POWER}+ce?weight=0.5']"),
    ],
)
def test_ce_weight_of_an_earlier_version_is_refused_with_what_to_write(tmp_path: Path, losses: dict, expected: str):
    with pytest.raises(UsageError, match="ce_weight is no longer an option") as refusal:
        read(tmp_path, ce_weight=0.5, **losses)
    assert expected in str(refusal.value)


def test_integers_and_strings_stand_for_numbers_and_paths(tmp_path: Path):
    options = read(tmp_path, lr=1, seeds=[1, 2], ema=0.5, val_archive="val.redistill.zarr", val="folder:val", amp=False)
    assert options.optim.lr == 1
    assert options.archive == Path("a.redistill.zarr")
    assert (options.seeds, options.ema, options.amp) == ((1, 2), 0.5, False)


def test_a_preset_survives_the_file(tmp_path: Path):
    config = preset("cifar-kd", model="ShuffleV2").optim
    values = {name: value for name, value in config.to_json().items() if value is not None}
    assert read(tmp_path, **values).optim == config


def test_an_option_wins_over_a_preset():
    options = TrainOptions.read(REQUIRED | {"lr": 0.3, "batch_size": 128}, preset_name="cifar-kd")
    assert (options.optim.lr, options.batch_size, options.optim.epochs) == (0.3, 128, 240)
    assert TrainOptions.read(REQUIRED, preset_name="cifar-kd").batch_size == 64


def test_a_config_is_written_and_read_back(tmp_path: Path):
    data = 'folder:a "quoted"\\ \x7f\tpath é'
    options = TrainOptions.read(REQUIRED | {"data": data, "cache_memory": float("inf")})
    write_config(tmp_path, options.to_json(), {"versions": {"redistill": "1"}})
    assert TrainOptions.read(read_config(tmp_path / "config.toml")) == options
    assert tomllib.loads((tmp_path / "config.toml").read_text())["versions"] == {"redistill": "1"}


def test_the_config_of_an_earlier_version_is_read(tmp_path: Path):
    (tmp_path / "config.toml").write_text(EARLIER)
    options = TrainOptions.read(read_config(tmp_path / "config.toml"))
    assert (options.losses, options.seeds, options.ema, options.optim.epochs) == (
        ("kl+ce?weight=0.3",),
        (3,),
        0.99,
        120,
    )


def test_members_are_every_combination_with_the_shortest_names_that_differ():
    options = TrainOptions.read(
        REQUIRED | {"students": ["demo:tiny", "demo:small"], "losses": ["kl?temperature=2", "kl + ce"], "seeds": [0, 1]}
    )
    assert [member.name for member in options.members] == [
        f"{student}-{loss}-{seed}"
        for student in ("demo-tiny", "demo-small")
        for loss in ("kl-temperature-2", "kl-+-ce")
        for seed in (0, 1)
    ]
    assert options.members[2].losses == ("kl", "ce")
    assert options.folder(options.members[0]) == Path("run/demo-tiny-kl-temperature-2-0")
    alone = TrainOptions.read(REQUIRED)
    assert alone.folder(alone.members[0]) == Path("run")
    with pytest.raises(UsageError, match="occur twice"):
        _ = TrainOptions.read(REQUIRED | {"seeds": [1, 1]}).members


def test_secrets_of_addresses_are_not_recorded(tmp_path: Path):
    data = "wds:https://me:hunter2@example.org/{000..146}.tar"
    options = TrainOptions(**(REQUIRED | {"data": data, "val": data}))
    write_config(tmp_path, options.to_json(), {})
    recorded = read_config(tmp_path / "config.toml")
    assert recorded["data"] == recorded["val"] == "wds:https://***@example.org/{000..146}.tar"
